//! Syllogisms: does a conclusion follow from premises of the forms all, no, some, some not?

use super::orders::orders;
use crate::{Draw, Family};

/// See the module.
///
/// A key is premises and conclusion, `Aab Abc > Aac`: A for all a are b, E for no, I for some, O for some a are not b.
/// It is the least of all keys that differ in which letter is which kind. Every kind has members, which the prompt
/// says. No work is shown: a thought would have to name regions, and none of the usual ways of it is short.
pub struct Syllogism;

/// Names that say nothing of the world.
const KINDS: [&str; 12] =
    ["wugs", "feps", "daxes", "toves", "blims", "zups", "gorps", "mips", "lorps", "raxes", "vims", "quons"];

/// Form, subject, predicate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Statement {
    form: u8,
    subject: usize,
    predicate: usize,
}

impl Statement {
    fn read(text: &str) -> Self {
        let bytes = text.as_bytes();
        Self {
            form: bytes[0],
            subject: usize::from(bytes[1] - b'a'),
            predicate: usize::from(bytes[2] - b'a'),
        }
    }

    /// A statement about two kinds, either way round.
    fn draw(one: usize, two: usize, draw: &mut Draw) -> Self {
        let (subject, predicate) = if draw.chance(0.5) { (one, two) } else { (two, one) };
        Self { form: *draw.pick(b"AEIO"), subject, predicate }
    }

    /// In a key, where kind `k` has become `to[k]`; no and some say the same both ways round.
    fn key(self, to: &[usize]) -> String {
        let (mut subject, mut predicate) = (to[self.subject], to[self.predicate]);
        if matches!(self.form, b'E' | b'I') && subject > predicate {
            std::mem::swap(&mut subject, &mut predicate);
        }
        let letter = |kind: usize| char::from(b'a' + kind as u8);
        format!("{}{}{}", char::from(self.form), letter(subject), letter(predicate))
    }

    /// Whether a region of the Venn diagram, bit k for kind k, is one that the statement is about: that must be empty
    /// for all and no, and that must have a member for some and some not.
    fn concerns(self, region: usize) -> bool {
        let within = |kind: usize| region >> kind & 1 == 1;
        within(self.subject) && within(self.predicate) == matches!(self.form, b'E' | b'I')
    }

    fn universal(self) -> bool {
        matches!(self.form, b'A' | b'E')
    }

    /// Whether it holds where exactly these regions have members.
    fn holds(self, inhabited: &[bool]) -> bool {
        let met = (0..inhabited.len()).any(|region| inhabited[region] && self.concerns(region));
        met != self.universal()
    }

    /// What holds exactly where this does not.
    fn negated(self) -> Self {
        let form = match self.form {
            b'A' => b'O',
            b'O' => b'A',
            b'E' => b'I',
            _ => b'E',
        };
        Self { form, ..self }
    }

    fn say(self, names: &[&str]) -> String {
        let (subject, predicate) = (names[self.subject], names[self.predicate]);
        match self.form {
            b'A' => format!("all {subject} are {predicate}"),
            b'E' => format!("no {subject} are {predicate}"),
            b'I' => format!("some {subject} are {predicate}"),
            _ => format!("some {subject} are not {predicate}"),
        }
    }
}

/// Whether some world has all statements true and a member of each of `kinds`.
///
/// It is enough to look at the fullest world, in which every region has a member that no universal statement empties:
/// whatever another world has, this one has.
fn possible(statements: &[Statement], kinds: usize) -> bool {
    let emptied = |region: usize| statements.iter().any(|one| one.universal() && one.concerns(region));
    let inhabited: Vec<bool> = (0..1 << kinds).map(|region| !emptied(region)).collect();
    let has = |kind: usize| (0..1 << kinds).any(|region| inhabited[region] && region >> kind & 1 == 1);
    statements.iter().all(|one| one.holds(&inhabited)) && (0..kinds).all(has)
}

/// Whether no world has the premises true and the conclusion false.
fn follows(premises: &[Statement], conclusion: Statement, kinds: usize) -> bool {
    let mut statements = premises.to_vec();
    statements.push(conclusion.negated());
    !possible(&statements, kinds)
}

/// Premises, conclusion, number of kinds.
fn read(key: &str) -> (Vec<Statement>, Statement, usize) {
    let (premises, conclusion) = key.split_once(" > ").expect("a key of this family");
    let kinds =
        key.bytes().filter(u8::is_ascii_lowercase).max().map_or(0, |last| usize::from(last - b'a') + 1);
    (premises.split(' ').map(Statement::read).collect(), Statement::read(conclusion), kinds)
}

/// The key that does not depend on the kinds' names and the premises' order.
fn canonical(premises: &[Statement], conclusion: Statement, kinds: usize) -> String {
    let named = |to: Vec<usize>| {
        let mut said: Vec<String> = premises.iter().map(|one| one.key(&to)).collect();
        said.sort_unstable();
        format!("{} > {}", said.join(" "), conclusion.key(&to))
    };
    orders(kinds).into_iter().map(named).min().unwrap_or_default()
}

impl Family for Syllogism {
    fn name(&self) -> &'static str {
        "syllogism"
    }

    fn about(&self) -> &'static str {
        "say whether a conclusion follows from premises with all, no and some"
    }

    fn levels(&self) -> u32 {
        4
    }

    fn key(&self, level: u32, draw: &mut Draw) -> String {
        let count = level as usize + 1;
        let kinds = (count + 1).min(5);
        let wanted = draw.chance(0.5);
        loop {
            let loose = draw.chance(0.3);
            let mut pair = |at: usize| {
                let one = if loose { draw.below(kinds as u64) as usize } else { at % kinds };
                let two = if loose { one + 1 + draw.below(kinds as u64 - 1) as usize } else { at + 1 };
                Statement::draw(one, two % kinds, draw)
            };
            let premises: Vec<Statement> = (0..count).map(&mut pair).collect();
            let ends = Statement::draw(0, kinds - 1, draw);
            let identity: Vec<usize> = (0..kinds).collect();
            let said: Vec<String> = premises.iter().map(|one| one.key(&identity)).collect();
            let repeated =
                (0..count).any(|at| said[..at].contains(&said[at])) || said.contains(&ends.key(&identity));
            let met = (0..kinds).all(|kind| {
                premises.iter().chain([&ends]).any(|one| one.subject == kind || one.predicate == kind)
            });
            if !repeated && met && possible(&premises, kinds) && follows(&premises, ends, kinds) == wanted {
                return canonical(&premises, ends, kinds);
            }
        }
    }

    fn prompt(&self, key: &str, draw: &mut Draw) -> String {
        let (mut premises, conclusion, _) = read(key);
        let mut names = KINDS;
        draw.shuffle(&mut names);
        draw.shuffle(&mut premises);
        let mut said = String::new();
        for premise in premises {
            let text = premise.say(&names);
            said.push_str(&text[..1].to_ascii_uppercase());
            said.push_str(&text[1..]);
            said.push_str(". ");
        }
        let conclusion = conclusion.say(&names);
        match draw.below(2) {
            0 => format!("Each kind has members. {said}Does it follow that {conclusion}? yes or no"),
            _ => format!("{said}If all these kinds exist, must it be that {conclusion}? yes or no"),
        }
    }

    fn answer(&self, key: &str) -> String {
        let (premises, conclusion, kinds) = read(key);
        if follows(&premises, conclusion, kinds) { "yes" } else { "no" }.to_owned()
    }

    fn verify(&self, key: &str, answer: &str) -> bool {
        let answer = answer.trim().trim_end_matches(['.', '!']);
        let said = match answer.to_ascii_lowercase().as_str() {
            "yes" | "yes, it follows" | "it follows" => "yes",
            "no" | "no, it does not follow" | "it does not follow" => "no",
            _ => return false,
        };
        said == self.answer(key)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_old_figures_hold() {
        for (key, follows) in [
            ("Aab Abc > Aac", "yes"),
            ("Aab Ebc > Eac", "yes"),
            ("Iab Abc > Iac", "yes"),
            ("Iab Ebc > Oac", "yes"),
            // with members in each kind
            ("Aab Aac > Ibc", "yes"),
            ("Aab Abc > Ica", "yes"),
            ("Aab Acb > Aac", "no"),
            ("Iab Ibc > Iac", "no"),
            ("Aab Abc > Aca", "no"),
            ("Oab Abc > Oac", "no"),
        ] {
            assert_eq!(Syllogism.answer(key), follows, "{key}");
            assert!(Syllogism.verify(key, &format!("{}.", follows.to_uppercase())));
        }
        for answer in ["no", "yes no", "yesno", "y", "maybe", "not yes", "true"] {
            assert!(!Syllogism.verify("Aab Abc > Aac", answer), "{answer}");
        }
    }

    #[test]
    fn the_fullest_world_decides_as_all_worlds_do() {
        for level in 1..=2 {
            for index in 0..if level == 1 { 150 } else { 5 } {
                let (premises, conclusion, kinds) = read(&Syllogism.key(level, &mut Draw::new(8, index)));
                let regions = 1_usize << kinds;
                let counterexample = (0..1_u64 << regions).any(|world| {
                    let inhabited: Vec<bool> = (0..regions).map(|region| world >> region & 1 == 1).collect();
                    let has =
                        |kind: usize| (0..regions).any(|region| inhabited[region] && region >> kind & 1 == 1);
                    (0..kinds).all(has)
                        && premises.iter().all(|one| one.holds(&inhabited))
                        && !conclusion.holds(&inhabited)
                });
                assert_eq!(
                    follows(&premises, conclusion, kinds),
                    !counterexample,
                    "{premises:?} {conclusion:?}"
                );
            }
        }
    }

    #[test]
    fn names_and_order_do_not_make_another_problem() {
        let key = |text: &str| {
            let (premises, conclusion, kinds) = read(text);
            canonical(&premises, conclusion, kinds)
        };
        assert_eq!(key("Aab Ebc > Eac"), key("Ecb Aab > Eca"));
        assert_eq!(key("Aab Ebc > Eac"), key("Eab Acb > Eca"));
        assert_ne!(key("Aab Abc > Aac"), key("Aab Abc > Aca"));
    }

    #[test]
    fn both_answers_are_common() {
        for level in 1..=4 {
            let yes = (0..200)
                .filter(|&index| Syllogism.answer(&Syllogism.key(level, &mut Draw::new(9, index))) == "yes");
            assert!((60..140).contains(&yes.count()), "level {level}");
        }
    }
}
