//! Chains of modular arithmetic: `start 7; +5, *3, -4 (mod 10)`.

use crate::{Care, Draw, Family, Work, number};

/// See the module.
pub struct Chain;

/// Up to this level chains are modulo ten and only add and subtract.
const DECIMAL: u32 = 5;

/// A key, read: modulus, start, steps.
struct Steps {
    modulus: i64,
    start: i64,
    operations: Vec<(char, i64)>,
}

impl Steps {
    /// Reads `M S +A *B ...`.
    fn read(key: &str) -> Self {
        let mut words = key.split(' ');
        let mut number = || words.next().and_then(|word| word.parse().ok()).expect("a key of this family");
        let (modulus, start) = (number(), number());
        let step = |word: &str| {
            let operand = word[1..].parse().expect("a key of this family");
            (word.as_bytes()[0] as char, operand)
        };
        Self { modulus, start, operations: words.map(step).collect() }
    }

    /// The value after a step.
    fn after(&self, value: i64, (op, operand): (char, i64)) -> i64 {
        let result = match op {
            '+' => value + operand,
            '-' => value - operand,
            _ => value * operand,
        };
        result.rem_euclid(self.modulus)
    }

    fn result(&self) -> i64 {
        self.operations.iter().fold(self.start, |value, &step| self.after(value, step))
    }
}

impl Family for Chain {
    fn name(&self) -> &'static str {
        "chain"
    }

    fn about(&self) -> &'static str {
        "follow a chain of additions, subtractions and multiplications modulo a number"
    }

    fn levels(&self) -> u32 {
        8
    }

    fn key(&self, level: u32, draw: &mut Draw) -> String {
        // the last digit first, which needs no other table than everyone's
        let modulus = if level <= DECIMAL { 10 } else { draw.between(7, 10) };
        let mut key = format!("{modulus} {}", draw.between(0, modulus - 1));
        for _ in 0..=level {
            let op = *draw.pick(if level <= DECIMAL { &['+', '-'][..] } else { &['+', '-', '*'] });
            let operand = draw.between(if op == '*' { 2 } else { 1 }, modulus - 1);
            key += &format!(" {op}{operand}");
        }
        key
    }

    fn prompt(&self, key: &str, draw: &mut Draw) -> String {
        let Steps { modulus, start, operations } = Steps::read(key);
        let steps: Vec<String> = operations.iter().map(|(op, operand)| format!("{op}{operand}")).collect();
        let steps = steps.join(" ");
        match draw.below(2) {
            0 => format!("mod {modulus}: start {start}, then {steps} = ?"),
            _ => format!("Start with {start} and do {steps} modulo {modulus}."),
        }
    }

    fn answer(&self, key: &str) -> String {
        Steps::read(key).result().to_string()
    }

    fn verify(&self, key: &str, answer: &str) -> bool {
        number::is(answer, Steps::read(key).result())
    }

    fn work(&self, key: &str, care: Care, _draw: &mut Draw) -> Option<Work> {
        let chain = Steps::read(key);
        let mut thought = String::new();
        let mut value = chain.start;
        let group = if care == Care::Full { 1 } else { 3 };
        if care != Care::None {
            for steps in chain.operations.chunks(group) {
                let before = value;
                value = steps.iter().fold(value, |value, &step| chain.after(value, step));
                let steps: Vec<String> = steps.iter().map(|(op, operand)| format!("{op}{operand}")).collect();
                thought += &format!("{before}{}={value}\n", steps.join(""));
            }
        }
        Some(Work { thought: thought.trim_end().to_owned(), answer: chain.result().to_string() })
    }
}
