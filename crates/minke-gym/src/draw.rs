//! Random choices in a row, each a function of (seed, stream, how many came before).

use minke_num::rng;

/// A sequence of draws with a name.
#[derive(Debug, Clone)]
pub struct Draw {
    seed: u64,
    stream: u64,
    counter: u64,
}

impl Draw {
    /// The draws of a seed and stream, from the first.
    pub fn new(seed: u64, stream: u64) -> Self {
        Self { seed, stream, counter: 0 }
    }

    /// An integer in `0..n`.
    ///
    /// # Panics
    /// When `n` is 0.
    pub fn below(&mut self, n: u64) -> u64 {
        self.counter += 1;
        rng::below(self.seed, self.stream, self.counter - 1, n)
    }

    /// An integer from `low` to `high`, both included.
    ///
    /// # Panics
    /// When there is none.
    pub fn between(&mut self, low: i64, high: i64) -> i64 {
        assert!(low <= high, "between: {low} to {high} is empty");
        low + self.below((high - low) as u64 + 1) as i64
    }

    /// True with probability `p`.
    pub fn chance(&mut self, p: f64) -> bool {
        self.counter += 1;
        rng::uniform_f64(self.seed, self.stream, self.counter - 1) < p
    }

    /// One of `items`.
    ///
    /// # Panics
    /// When there are none.
    pub fn pick<'t, T>(&mut self, items: &'t [T]) -> &'t T {
        &items[self.below(items.len() as u64) as usize]
    }

    /// Puts `items` into a random order (Fisher-Yates).
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.below(i as u64 + 1) as usize);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn draws_stay_in_range_and_repeat() {
        let run = |seed| {
            let mut draw = Draw::new(seed, 3);
            let mut order: Vec<u32> = (0..10).collect();
            draw.shuffle(&mut order);
            assert!((0..200).all(|_| (-3..=4).contains(&draw.between(-3, 4))));
            let hits = (0..2000).filter(|_| draw.chance(0.25)).count();
            assert!((400..600).contains(&hits), "{hits}");
            order
        };
        assert_eq!(run(1), run(1));
        assert_ne!(run(1), run(2));
        let mut sorted = run(1);
        sorted.sort_unstable();
        assert_eq!(sorted, (0..10).collect::<Vec<_>>());
    }
}
