//! Damage done to valid files, the same on every run.

use minke_num::rng;

/// A stream of numbers by (seed, case).
pub struct Dice {
    seed: u64,
    case: u64,
    drawn: u64,
}

impl Dice {
    pub fn new(seed: u64, case: u64) -> Self {
        Self { seed, case, drawn: 0 }
    }

    /// A number below `n`.
    pub fn below(&mut self, n: usize) -> usize {
        self.drawn += 1;
        let x = rng::uniform_f64(self.seed, self.case, self.drawn);
        ((x * n as f64) as usize).min(n.saturating_sub(1))
    }

    fn pick<'a, T: ?Sized>(&mut self, from: &[&'a T]) -> &'a T {
        from[self.below(from.len())]
    }
}

/// Numbers that break arithmetic.
const NUMBERS: [&str; 12] = [
    "0",
    "-1",
    "1",
    "255",
    "65536",
    "4294967295",
    "4294967296",
    "9223372036854775807",
    "18446744073709551615",
    "1e309",
    "-0.0",
    "123456789012345678901234567890",
];

/// Damages a file a few times. `words` are of its format.
pub fn mutate(file: &[u8], words: &[&str], dice: &mut Dice) -> Vec<u8> {
    let mut out = file.to_vec();
    for _ in 0..=dice.below(6) {
        let at = dice.below(out.len().max(1));
        match dice.below(10) {
            0 if !out.is_empty() => out[at] ^= 1 << dice.below(8),
            1 if !out.is_empty() => out[at] = dice.below(256) as u8,
            2 => out.truncate(at),
            3 => {
                let end = (at + dice.below(40)).min(out.len());
                out.drain(at.min(end)..end);
            }
            4 => {
                // something twice, or many times
                let end = (at + 1 + dice.below(60)).min(out.len());
                let piece = out[at.min(end)..end].to_vec();
                let times = if dice.below(8) == 0 { 50 } else { 1 };
                let many: Vec<u8> = piece.iter().copied().cycle().take(piece.len() * times).collect();
                out.splice(end..end, many);
            }
            5 => {
                let from = dice.below(out.len().max(1));
                let end = (from + dice.below(60)).min(out.len());
                let piece = out[from.min(end)..end].to_vec();
                out.splice(at.min(out.len())..at.min(out.len()), piece);
            }
            6 => number(&mut out, at, dice),
            7 if out.len() > 8 => {
                // the length that stands at the beginning of many formats
                let huge = [0, 1, 8, u64::from(u32::MAX), u64::MAX / 2, u64::MAX][dice.below(6)];
                out[..8].copy_from_slice(&huge.to_le_bytes());
            }
            _ if !words.is_empty() => {
                let word = dice.pick(words).as_bytes();
                let end = if dice.below(2) == 0 { at } else { (at + word.len()).min(out.len()) };
                out.splice(at.min(end)..end, word.iter().copied());
            }
            _ => {}
        }
    }
    out
}

/// Puts another number in place of one behind `at`.
fn number(out: &mut Vec<u8>, at: usize, dice: &mut Dice) {
    let Some(begin) = out.iter().skip(at).position(u8::is_ascii_digit).map(|n| n + at) else { return };
    let end = out[begin..].iter().position(|b| !b.is_ascii_digit()).map_or(out.len(), |n| begin + n);
    let other = dice.pick(&NUMBERS);
    out.splice(begin..end, other.bytes());
}
