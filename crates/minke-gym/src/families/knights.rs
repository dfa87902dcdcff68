//! Knights, who tell the truth, and knaves, who lie.

use super::orders::orders;
use crate::{Care, Draw, Family, Work};

/// See the module.
///
/// A key has one statement a person, in the order of the speakers A, B, ...: `B+` (B is a knight), `B-` (a knave),
/// `A=C` (of one kind), `A!C` (of two kinds), `A-&B+` (both), `A-|B+` (at least one). It is the least of all keys that
/// differ in who has which name.
pub struct Knights;

/// A person and whether a knight is claimed.
type Claim = (usize, bool);

#[derive(Debug, Clone, Copy)]
enum Statement {
    Is(Claim),
    Same(usize, usize, bool),
    Both(Claim, Claim),
    Either(Claim, Claim),
}

fn name(person: usize) -> char {
    char::from(b'A' + person as u8)
}

fn kind(knight: bool) -> &'static str {
    if knight { "knight" } else { "knave" }
}

impl Statement {
    fn read(text: &str) -> Self {
        let bytes = text.as_bytes();
        let person = |at: usize| usize::from(bytes[at] - b'A');
        let claim = |at: usize| (person(at), bytes[at + 1] == b'+');
        match (bytes[1], bytes.get(2)) {
            (b'=' | b'!', _) => Self::Same(person(0), person(2), bytes[1] == b'='),
            (_, None) => Self::Is(claim(0)),
            (_, Some(b'&')) => Self::Both(claim(0), claim(3)),
            _ => Self::Either(claim(0), claim(3)),
        }
    }

    /// What a speaker may say of `count` persons; with `plain`, of one or of two kinds and nothing compound too.
    fn draw(speaker: usize, count: usize, plain: bool, draw: &mut Draw) -> Self {
        let mut persons: Vec<usize> = (0..count).collect();
        draw.shuffle(&mut persons);
        let (one, two) = (persons[0], persons[1]);
        let other = if one == speaker { two } else { one };
        let (first, second) = (draw.chance(0.5), draw.chance(0.5));
        match if plain { draw.below(6) } else { 4 + draw.below(2) } {
            0 | 1 => Self::Is((other, first)),
            2 | 3 => Self::Same(one, two, first),
            4 => Self::Both((one, first), (two, second)),
            _ => Self::Either((one, first), (two, second)),
        }
    }

    fn holds(self, knights: &[bool]) -> bool {
        let good = |(person, knight): Claim| knights[person] == knight;
        match self {
            Self::Is(claim) => good(claim),
            Self::Same(one, two, same) => (knights[one] == knights[two]) == same,
            Self::Both(one, two) => good(one) && good(two),
            Self::Either(one, two) => good(one) || good(two),
        }
    }

    /// The statement in a key, where person `p` has become `to[p]`.
    fn key(self, to: &[usize]) -> String {
        let claim =
            |(person, knight): Claim| format!("{}{}", name(to[person]), if knight { '+' } else { '-' });
        let pair = |one: Claim, two: Claim, sign: char| {
            let (one, two) = (claim(one), claim(two));
            format!("{}{sign}{}", (&one).min(&two), (&one).max(&two))
        };
        match self {
            Self::Is(one) => claim(one),
            Self::Same(one, two, same) => {
                let (one, two) = (name(to[one]), name(to[two]));
                format!("{}{}{}", one.min(two), if same { '=' } else { '!' }, one.max(two))
            }
            Self::Both(one, two) => pair(one, two, '&'),
            Self::Either(one, two) => pair(one, two, '|'),
        }
    }

    fn say(self) -> String {
        let claim = |(person, knight): Claim| format!("{} is a {}", name(person), kind(knight));
        match self {
            Self::Is(one) => claim(one),
            Self::Same(one, two, true) => format!("{} and {} are the same kind", name(one), name(two)),
            Self::Same(one, two, false) => format!("{} and {} are different kinds", name(one), name(two)),
            Self::Both(one, two) => format!("{} and {}", claim(one), claim(two)),
            Self::Either(one, two) => format!("{} or {}", claim(one), claim(two)),
        }
    }
}

fn read(key: &str) -> Vec<Statement> {
    key.split(' ').map(Statement::read).collect()
}

/// All ways to be knights and knaves, from all knights on.
fn assignments(count: usize) -> impl Iterator<Item = Vec<bool>> {
    (0..1_usize << count)
        .map(move |bits| (0..count).map(|person| bits >> (count - 1 - person) & 1 == 0).collect())
}

fn consistent(statements: &[Statement], knights: &[bool]) -> bool {
    statements.iter().zip(knights).all(|(statement, &knight)| statement.holds(knights) == knight)
}

/// The one way to be that fits, if there is exactly one.
fn solve(statements: &[Statement]) -> Option<Vec<bool>> {
    let mut fitting = assignments(statements.len()).filter(|knights| consistent(statements, knights));
    let first = fitting.next()?;
    fitting.next().is_none().then_some(first)
}

/// The key that does not depend on who has which name.
fn canonical(statements: &[Statement]) -> String {
    let named = |to: Vec<usize>| {
        let mut said = vec![String::new(); statements.len()];
        for (speaker, statement) in statements.iter().enumerate() {
            said[to[speaker]] = statement.key(&to);
        }
        said.join(" ")
    };
    orders(statements.len()).into_iter().map(named).min().unwrap_or_default()
}

/// Reads `A knight, B knave`, `b is a knave; a is a knight`, each person once.
fn parse(answer: &str, count: usize) -> Option<Vec<bool>> {
    let cut = |c: char| c.is_whitespace() || matches!(c, ',' | ';' | ':' | '.' | '=');
    let mut words = answer.split(cut).filter(|word| !word.is_empty()).peekable();
    let mut kinds: Vec<Option<bool>> = vec![None; count];
    while let Some(word) = words.next() {
        let word = if word.eq_ignore_ascii_case("and") { words.next()? } else { word };
        let &[letter] = word.as_bytes() else { return None };
        let place = kinds.get_mut(usize::from(letter.to_ascii_uppercase().checked_sub(b'A')?))?;
        for filler in ["is", "a"] {
            words.next_if(|word| word.eq_ignore_ascii_case(filler));
        }
        let knight = match words.next()?.to_ascii_lowercase().as_str() {
            "knight" => true,
            "knave" => false,
            _ => return None,
        };
        if place.replace(knight).is_some() {
            return None;
        }
    }
    kinds.into_iter().collect()
}

impl Family for Knights {
    fn name(&self) -> &'static str {
        "knights"
    }

    fn about(&self) -> &'static str {
        "tell knights, who say the truth, from knaves, who lie"
    }

    fn key(&self, level: u32, draw: &mut Draw) -> String {
        loop {
            let count = match level {
                1 => 2 + usize::from(draw.chance(0.6)),
                2 => 3,
                3 => 4,
                _ => 5,
            };
            let statements: Vec<Statement> =
                (0..count).map(|speaker| Statement::draw(speaker, count, level < 5, draw)).collect();
            if solve(&statements).is_some() {
                return canonical(&statements);
            }
        }
    }

    fn prompt(&self, key: &str, draw: &mut Draw) -> String {
        let said: Vec<String> = read(key)
            .iter()
            .enumerate()
            .map(|(speaker, statement)| format!("{} says: {}.", name(speaker), statement.say()))
            .collect();
        let said = said.join(" ");
        match draw.below(2) {
            0 => format!("Knights tell the truth, knaves lie. {said} Who is what? (A knight, B ...)"),
            _ => format!("{said} Say of each: knight (all true) or knave (all false)? (A knight, B ...)"),
        }
    }

    fn answer(&self, key: &str) -> String {
        let knights = solve(&read(key)).expect("a key of this family");
        let each =
            knights.iter().enumerate().map(|(person, &knight)| format!("{} {}", name(person), kind(knight)));
        each.collect::<Vec<_>>().join(", ")
    }

    fn verify(&self, key: &str, answer: &str) -> bool {
        let statements = read(key);
        parse(answer, statements.len()).is_some_and(|knights| consistent(&statements, &knights))
    }

    /// Tries all ways in turn (`+` a knight, `-` a knave) until one fits; with care each speaker up to a
    /// contradiction is looked at, else a try is judged at once.
    fn work(&self, key: &str, care: Care, _draw: &mut Draw) -> Option<Work> {
        let statements = read(key);
        let mut lines = Vec::new();
        for knights in assignments(statements.len()) {
            let mut line: String = knights.iter().map(|&knight| if knight { '+' } else { '-' }).collect();
            let fits = consistent(&statements, &knights);
            if care == Care::Full {
                for (speaker, statement) in statements.iter().enumerate() {
                    let good = statement.holds(&knights) == knights[speaker];
                    line.extend([' ', name(speaker)]);
                    line.push_str(if good { " ok" } else { " no" });
                    if !good {
                        break;
                    }
                }
            } else {
                line.push_str(if fits { " ok" } else { " no" });
            }
            lines.push(line);
            if fits {
                break;
            }
        }
        let thought = if care == Care::None { String::new() } else { lines.join("\n") };
        Some(Work { thought, answer: self.answer(key) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A: "B is a knave"; B: "A and B are the same kind".
    const KEY: &str = "B- A=B";

    #[test]
    fn the_one_way_that_fits_is_found() {
        assert_eq!(Knights.answer(KEY), "A knight, B knave");
        assert_eq!(solve(&read("B+ A+")), None);
        // a knave cannot say that one of the two is a knave
        assert_eq!(Knights.answer("A-|B- A-"), "A knight, B knave");
    }

    #[test]
    fn answers_pass_in_any_order_and_case() {
        for answer in [
            "A knight, B knave",
            "b knave a knight",
            "A is a knight and B is a knave.",
            "A: Knight; B: Knave",
            "A = knight\nB = knave",
        ] {
            assert!(Knights.verify(KEY, answer), "{answer}");
        }
        for answer in [
            "A knight",
            "A knave, B knight",
            "A knight, B knave, A knave",
            "A knight, B knave, C knave",
            "A not knight, B knave",
            "knight knave",
            "A knight, B not a knave",
            "A knight, B",
            "@ knight",
            "and",
        ] {
            assert!(!Knights.verify(KEY, answer), "{answer}");
        }
        assert!(!Knights.verify(KEY, &"A knight ".repeat(50_000)));
    }

    #[test]
    fn names_do_not_make_another_problem() {
        assert_eq!(canonical(&read("B- A=B")), canonical(&read("A=B A-")));
        for index in 0..100 {
            let key = Knights.key(1 + index % 5, &mut Draw::new(2, u64::from(index)));
            assert_eq!(canonical(&read(&key)), key);
        }
    }

    #[test]
    fn thoughts_are_as_written_here() {
        let thought = |care| Knights.work(KEY, care, &mut Draw::new(0, 0)).unwrap().thought;
        assert_eq!(thought(Care::Full), "++ A no\n+- A ok B ok");
        assert_eq!(thought(Care::Brief), "++ no\n+- ok");
    }
}
