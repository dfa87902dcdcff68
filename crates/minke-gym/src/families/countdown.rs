//! Reach a target with given numbers: `21 3 5 12` is `(12-5)*3`.

mod expression;

use super::shared::read;
use crate::{Care, Draw, Family, Work};

/// See the module.
pub struct Countdown;

/// A number at hand, and how it came about from the given ones.
#[derive(Debug, Clone)]
struct Term {
    value: i64,
    text: String,
    /// 0 for a given number, 1 for a product or quotient, 2 for a sum or difference.
    rank: u8,
}

/// One operation: left, operator, right, result.
type Step = (i64, char, i64, i64);

/// Reads `TARGET N N N`, the numbers in rising order.
fn parts(key: &str) -> (i64, Vec<i64>) {
    let mut words = key.split(' ').map(read);
    let target = words.next().expect("a key of this family");
    (target, words.collect())
}

impl Term {
    fn given(value: i64) -> Self {
        Self { value, text: value.to_string(), rank: 0 }
    }

    fn wrapped(&self, most: u8) -> String {
        if self.rank > most { format!("({})", self.text) } else { self.text.clone() }
    }

    fn with(&self, op: char, other: &Self, value: i64) -> Self {
        let (left, right, rank) = match op {
            '+' => (2, 2, 2),
            '-' => (2, 1, 2),
            '*' => (1, 1, 1),
            _ => (1, 0, 1),
        };
        Self { value, text: format!("{}{op}{}", self.wrapped(left), other.wrapped(right)), rank }
    }
}

fn said((x, op, y, value): Step) -> String {
    format!("{x}{op}{y}={value}\n")
}

/// What two numbers make, the larger one on the left; whole and positive, and nothing that changes nothing.
fn results(x: i64, y: i64) -> Vec<(char, i64)> {
    let mut results = vec![('+', x + y)];
    if x > y {
        results.push(('-', x - y));
    }
    if y > 1 {
        results.push(('*', x * y));
        if x % y == 0 {
            results.push(('/', x / y));
        }
    }
    results
}

/// All but two of the terms.
fn without(terms: &[Term], i: usize, j: usize) -> Vec<Term> {
    let rest = terms.iter().enumerate().filter(|(index, _)| *index != i && *index != j);
    rest.map(|(_, term)| term.clone()).collect()
}

/// A way to the target in exactly `steps` operations: its steps and expression.
fn way(terms: &[Term], target: i64, steps: usize) -> Option<(Vec<Step>, String)> {
    for i in 0..terms.len() {
        for j in i + 1..terms.len() {
            let (x, y) = if terms[i].value >= terms[j].value {
                (&terms[i], &terms[j])
            } else {
                (&terms[j], &terms[i])
            };
            for (op, value) in results(x.value, y.value) {
                let step = (x.value, op, y.value, value);
                let made = x.with(op, y, value);
                if steps == 1 {
                    if value == target {
                        return Some((vec![step], made.text));
                    }
                    continue;
                }
                let mut rest = without(terms, i, j);
                rest.push(made);
                if let Some((mut later, text)) = way(&rest, target, steps - 1) {
                    later.insert(0, step);
                    return Some((later, text));
                }
            }
        }
    }
    None
}

/// A shortest way to the target.
fn shortest(target: i64, numbers: &[i64]) -> Option<(Vec<Step>, String)> {
    let terms: Vec<Term> = numbers.iter().map(|&number| Term::given(number)).collect();
    (1..numbers.len()).find_map(|steps| way(&terms, target, steps))
}

/// What a pair makes, and whether that is enough: `7,2: 9 5 14 yes`.
fn glance(x: i64, y: i64, target: i64) -> (bool, String) {
    let (x, y) = (x.max(y), x.min(y));
    let made = results(x, y);
    let found = made.iter().any(|&(_, value)| value == target);
    let values: Vec<String> = made.iter().map(|(_, value)| value.to_string()).collect();
    (found, format!("{x},{y}: {} {}\n", values.join(" "), if found { "yes" } else { "no" }))
}

/// The work: what is known to lead on, a few tries that do not, the one that does.
fn search(target: i64, numbers: &[i64], steps: &[Step], draw: &mut Draw) -> String {
    let mut lines = String::new();
    let mut at_hand = numbers.to_vec();
    let take = |at_hand: &mut Vec<i64>, number: i64| {
        let at = at_hand.iter().position(|&other| other == number).expect("steps use what is at hand");
        at_hand.remove(at);
    };
    // all steps but the last two are said; the last two are searched for
    let known = steps.len().saturating_sub(2);
    for &(x, op, y, value) in &steps[..known] {
        lines += &said((x, op, y, value));
        take(&mut at_hand, x);
        take(&mut at_hand, y);
        at_hand.push(value);
    }
    for _ in 0..draw.between(1, 3) {
        draw.shuffle(&mut at_hand);
        let (mut x, mut y) = (at_hand[0].max(at_hand[1]), at_hand[0].min(at_hand[1]));
        let mut before = String::new();
        if steps.len() > 1 {
            let (op, value) = *draw.pick(&results(x, y));
            before = said((x, op, y, value));
            (x, y) = (value, at_hand[2]);
        }
        let (found, line) = glance(x, y, target);
        if !found && !lines.contains(&format!("{before}{line}")) {
            lines += &(before + &line);
        }
    }
    let (last, before) = steps.split_last().expect("a way has a step");
    if let Some(&step) = before.last() {
        lines += &said(step);
    }
    lines + &glance(last.0, last.2, target).1 + &said(*last)
}

impl Family for Countdown {
    fn name(&self) -> &'static str {
        "countdown"
    }

    fn about(&self) -> &'static str {
        "reach a target with some of the given numbers and + - * /"
    }

    fn levels(&self) -> u32 {
        4
    }

    fn key(&self, level: u32, draw: &mut Draw) -> String {
        // numbers given, the largest, and the operations that are needed at least
        let (given, most, steps) = match level {
            1 => (3, 12, 1),
            2 => (3, 12, 2),
            3 => (4, 12, 2),
            _ => (4, 25, 3),
        };
        loop {
            let mut numbers: Vec<i64> = (0..given).map(|_| draw.between(1, most)).collect();
            numbers.sort_unstable();
            let mut at_hand = numbers.clone();
            for _ in 0..steps {
                draw.shuffle(&mut at_hand);
                let (x, y) = (at_hand.pop(), at_hand.pop());
                let (x, y) = x.zip(y).expect("fewer steps than numbers");
                at_hand.push(draw.pick(&results(x.max(y), x.min(y))).1);
            }
            let target = *at_hand.last().expect("a step leaves its result");
            let needed = || shortest(target, &numbers).map(|(steps, _)| steps.len());
            if target <= 100 && !numbers.contains(&target) && needed() == Some(steps) {
                let numbers: Vec<String> = numbers.iter().map(i64::to_string).collect();
                return format!("{target} {}", numbers.join(" "));
            }
        }
    }

    fn prompt(&self, key: &str, draw: &mut Draw) -> String {
        let (target, mut numbers) = parts(key);
        draw.shuffle(&mut numbers);
        let numbers: Vec<String> = numbers.iter().map(i64::to_string).collect();
        let numbers = numbers.join(" ");
        match draw.below(2) {
            0 => format!("Make {target} from some of {numbers}, each once, with + - * / ( )."),
            _ => format!("Use {numbers} (not all needed, each once) and + - * / ( ) to get {target}."),
        }
    }

    fn answer(&self, key: &str) -> String {
        let (target, numbers) = parts(key);
        shortest(target, &numbers).expect("a key has a solution").1
    }

    fn verify(&self, key: &str, answer: &str) -> bool {
        let (target, numbers) = parts(key);
        expression::reaches(answer, target, &numbers)
    }

    fn work(&self, key: &str, care: Care, draw: &mut Draw) -> Option<Work> {
        let (target, numbers) = parts(key);
        let (steps, answer) = shortest(target, &numbers).expect("a key has a solution");
        let thought = match care {
            Care::Full => search(target, &numbers, &steps, draw),
            Care::Brief => steps.iter().map(|&step| said(step)).collect(),
            Care::None => String::new(),
        };
        Some(Work { thought: thought.trim_end().to_owned(), answer })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn solutions_are_shortest_and_written_with_few_brackets() {
        assert_eq!(Countdown.answer("21 3 5 12"), "(12-5)*3");
        assert_eq!(Countdown.answer("7 2 5 12"), "5+2");
        assert_eq!(shortest(99, &[2, 5, 12]).map(|(steps, _)| steps.len()), None);
        let brief = Countdown.work("21 3 5 12", Care::Brief, &mut Draw::new(0, 0)).unwrap();
        assert_eq!(brief.thought, "12-5=7\n7*3=21");
    }

    #[test]
    fn every_line_of_a_search_is_true() {
        for index in 0..200 {
            let key = Countdown.key(1 + (index % 4) as u32, &mut Draw::new(6, index));
            let (target, numbers) = parts(&key);
            let thought = Countdown.work(&key, Care::Full, &mut Draw::new(7, index)).unwrap().thought;
            assert!(thought.lines().count() <= 10, "{key}: {thought}");
            for line in thought.lines() {
                if let Some((sum, value)) = line.split_once('=') {
                    let all: Vec<i64> = sum.split(['+', '-', '*', '/']).map(read).collect();
                    assert!(expression::reaches(sum, read(value), &all), "{key}: {line}");
                } else {
                    let (pair, said) = line.split_once(": ").unwrap();
                    let (x, y) = pair.split_once(',').unwrap();
                    let words: Vec<&str> = said.split(' ').collect();
                    let found = words.contains(&target.to_string().as_str());
                    assert_eq!(*words.last().unwrap() == "yes", found, "{key}: {line}");
                    assert_eq!(words.len() - 1, results(read(x), read(y)).len(), "{key}: {line}");
                }
            }
            assert!(thought.ends_with(&format!("={target}")), "{key}: {thought}");
            assert!(!numbers.contains(&target));
        }
    }
}
