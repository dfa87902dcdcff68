//! Sorting and selection: numbers up or down, words by the alphabet, the k-th smallest number.

use super::words::{self, WORDS};
use crate::{Care, Draw, Family, Work, number};

/// See the module.
///
/// A key is `asc`, `desc` or `nth K` and the items in rising order (`desc 3 9 14`, `nth 2 3 9 14`, `asc cat dog`): the
/// order in which they are shown is a function of the key, so the same items in another order are no other problem.
pub struct Sort;

/// Items at level 1; each level adds one.
const FEWEST: usize = 3;
/// Items are below this.
const BELOW: u64 = 100;
/// Items at once with little care.
const AT_ONCE: usize = 3;
/// Up to this level there are only numbers to be sorted.
const PLAIN: u32 = 4;
/// Up to this level words differ in their first letter.
const PLAIN_WORDS: u32 = 6;

/// What is asked.
#[derive(Clone, Copy, PartialEq)]
enum Ask {
    Ascending,
    Descending,
    Smallest(usize),
}

/// A key, read.
struct Items<'k> {
    ask: Ask,
    rising: Vec<&'k str>,
    shown: Vec<&'k str>,
}

impl<'k> Items<'k> {
    fn read(key: &'k str) -> Self {
        let mut words = key.split(' ');
        let ask = match words.next() {
            Some("asc") => Ask::Ascending,
            Some("desc") => Ask::Descending,
            _ => Ask::Smallest(words.next().and_then(|k| k.parse().ok()).expect("a key of this family")),
        };
        let rising: Vec<&str> = words.collect();
        let mut shown = rising.clone();
        words::draw_of(key).shuffle(&mut shown);
        Self { ask, rising, shown }
    }

    fn numbers(&self) -> bool {
        self.rising[0].as_bytes()[0].is_ascii_digit()
    }

    /// The items in the order asked for, as far as asked for.
    fn taken(&self) -> Vec<&'k str> {
        match self.ask {
            Ask::Ascending => self.rising.clone(),
            Ask::Descending => self.rising.iter().rev().copied().collect(),
            Ask::Smallest(k) => self.rising[..k].to_vec(),
        }
    }
}

/// `1st`, `2nd`, ..., for numbers up to 20.
pub(super) fn ordinal(n: usize) -> String {
    let end = match n {
        1 => "st",
        2 => "nd",
        3 => "rd",
        _ => "th",
    };
    format!("{n}{end}")
}

impl Family for Sort {
    fn name(&self) -> &'static str {
        "sort"
    }

    fn about(&self) -> &'static str {
        "sort numbers or words, or find the k-th smallest"
    }

    fn levels(&self) -> u32 {
        8
    }

    fn key(&self, level: u32, draw: &mut Draw) -> String {
        let count = FEWEST + level as usize - 1;
        // first numbers, up or down; then also the k-th smallest, and words
        let kind = draw.below(if level <= PLAIN { 13 } else { 20 });
        let mut items: Vec<String> = Vec::new();
        if kind < 16 {
            let mut numbers: Vec<u64> = Vec::new();
            while numbers.len() < count {
                let number = draw.below(BELOW);
                if !numbers.contains(&number) {
                    numbers.push(number);
                }
            }
            numbers.sort_unstable();
            items.extend(numbers.iter().map(u64::to_string));
        } else {
            while items.len() < count {
                let word = *draw.pick(&WORDS);
                let shared = if level <= PLAIN_WORDS { 1 } else { word.len() };
                if !items.iter().any(|other| other.starts_with(&word[..shared])) {
                    items.push(word.to_owned());
                }
            }
            items.sort_unstable();
        }
        let ask = match kind {
            0..9 | 16..19 => "asc".to_owned(),
            9..13 | 19.. => "desc".to_owned(),
            _ => format!("nth {}", draw.between(1, count as i64 - 1)),
        };
        format!("{ask} {}", items.join(" "))
    }

    fn prompt(&self, key: &str, draw: &mut Draw) -> String {
        let items = Items::read(key);
        let (first, numbers, shown) = (draw.below(2) == 0, items.numbers(), items.shown.join(" "));
        match (items.ask, numbers) {
            (Ask::Ascending, true) if first => format!("Sort ascending: {shown}"),
            (Ask::Ascending, true) => format!("Order from small to large: {shown}"),
            (Ask::Descending, true) if first => format!("Sort descending: {shown}"),
            (Ask::Descending, true) => format!("Order from large to small: {shown}"),
            (Ask::Ascending, false) if first => format!("Sort alphabetically: {shown}"),
            (Ask::Ascending, false) => format!("Order from A to Z: {shown}"),
            (Ask::Descending, false) if first => format!("Sort in reverse alphabetical order: {shown}"),
            (Ask::Descending, false) => format!("Order from Z to A: {shown}"),
            (Ask::Smallest(1), _) if first => format!("What is the smallest of {shown}?"),
            (Ask::Smallest(k), _) if first => format!("What is the {} smallest of {shown}?", ordinal(k)),
            (Ask::Smallest(k), _) => format!("Find number {k} from the bottom: {shown}"),
        }
    }

    fn answer(&self, key: &str) -> String {
        let items = Items::read(key);
        match items.ask {
            Ask::Smallest(k) => items.rising[k - 1].to_owned(),
            _ => items.taken().join(" "),
        }
    }

    fn verify(&self, key: &str, answer: &str) -> bool {
        let items = Items::read(key);
        let same = |got: &str, wanted: &str| match wanted.parse() {
            Ok(wanted) => number::is(got, wanted),
            Err(_) => got.eq_ignore_ascii_case(wanted),
        };
        let relation = match items.ask {
            Ask::Smallest(k) => return same(answer, items.rising[k - 1]),
            Ask::Ascending => '<',
            Ask::Descending => '>',
        };
        let answer = answer.trim().trim_end_matches('.');
        let answer = answer.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(answer);
        let mut got = answer
            .split(|c: char| c.is_whitespace() || c == ',' || c == ';' || c == relation)
            .filter(|part| !part.is_empty() && *part != "and");
        items.taken().iter().all(|wanted| got.next().is_some_and(|got| same(got, wanted)))
            && got.next().is_none()
    }

    /// Each line takes the next item from what is left, `3 | 14 9`; with little care the next three.
    fn work(&self, key: &str, care: Care, _draw: &mut Draw) -> Option<Work> {
        let items = Items::read(key);
        let at_once = match care {
            Care::Full => 1,
            Care::Brief => AT_ONCE,
            Care::None => return Some(Work { thought: String::new(), answer: self.answer(key) }),
        };
        let mut left = items.shown.clone();
        let step = |taken: &[&str]| {
            left.retain(|item| !taken.contains(item));
            let bar = if left.is_empty() { "" } else { "|" };
            format!("{}{bar}{}", taken.join(" "), left.join(" "))
        };
        let lines: Vec<String> = items.taken().chunks(at_once).map(step).collect();
        Some(Work { thought: lines.join("\n"), answer: self.answer(key) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn order_counts_and_separators_do_not() {
        for answer in
            ["3 9 14", "3, 9, 14", "[3, 9, 14]", "3 < 9 < 14", "3; 9 and 14.", "3\n9\n14", "03 9.0 14"]
        {
            assert!(Sort.verify("asc 3 9 14", answer), "{answer}");
        }
        for answer in ["14 9 3", "3 9", "3 9 14 14", "3 9 14 20", "3914", "3 > 9 > 14", "3 - 9 - 14", "3 9 x"]
        {
            assert!(!Sort.verify("asc 3 9 14", answer), "{answer}");
        }
        assert!(Sort.verify("desc 3 9 14", "14 > 9 > 3"));
        assert!(!Sort.verify("desc 3 9 14", "3 9 14"));
        assert!(Sort.verify("asc cat dog owl", "Cat, dog, and owl."));
        assert!(!Sort.verify("asc cat dog owl", "cat owl dog"));
        assert!(Sort.verify("nth 2 3 9 14", "9"));
        assert!(!Sort.verify("nth 2 3 9 14", "3 9"));
        assert!(!Sort.verify("asc 3 9 14", &"3 9 14 ".repeat(50_000)));
    }

    #[test]
    fn what_is_shown_is_a_function_of_the_key() {
        let shown = |key| Items::read(key).shown;
        let (key, mut sorted) = ("asc 1 2 3 4 5 6 7 8", shown("asc 1 2 3 4 5 6 7 8"));
        assert_eq!(shown(key), shown(key));
        assert_ne!(shown(key), Items::read(key).rising);
        sorted.sort_unstable();
        assert_eq!(sorted, Items::read(key).rising);
    }

    #[test]
    fn keys_are_in_rising_order() {
        for index in 0..300 {
            let key = Sort.key(1 + index % 8, &mut Draw::new(4, u64::from(index)));
            let items = Items::read(&key);
            let rises = |pair: &[&str]| match (pair[0].parse::<u32>(), pair[1].parse::<u32>()) {
                (Ok(one), Ok(two)) => one < two,
                _ => pair[0] < pair[1],
            };
            assert!(items.rising.windows(2).all(rises), "{key}");
        }
    }

    #[test]
    fn thoughts_take_from_what_is_left() {
        let key = "asc 1 3 4 9";
        let thought = |key, care| Sort.work(key, care, &mut Draw::new(0, 0)).unwrap().thought;
        let left = |out: &[&str]| {
            let shown = Items::read(key).shown;
            shown.into_iter().filter(|item| !out.contains(item)).collect::<Vec<_>>().join(" ")
        };
        let full = format!("1|{}\n3|{}\n4|{}\n9", left(&["1"]), left(&["1", "3"]), left(&["1", "3", "4"]));
        assert_eq!(thought(key, Care::Full), full);
        assert_eq!(thought(key, Care::Brief), "1 3 4|9\n9");
        assert_eq!(thought("nth 2 1 3 4 9", Care::Full).lines().count(), 2);
    }
}
