//! The gradients of all weights, by where the weights lie.

use std::ops::Range;

/// Gradients of stretches of the flat weights, which may have gaps between them.
#[derive(Clone, Debug)]
pub struct Grads<'a> {
    /// Where each starts among the weights; ascending.
    parts: Vec<(usize, &'a [f32])>,
}

impl<'a> Grads<'a> {
    /// Of parts and where each starts, in ascending order.
    pub fn new(parts: Vec<(usize, &'a [f32])>) -> Self {
        debug_assert!(parts.is_sorted_by(|(start, part), (next, _)| start + part.len() <= *next));
        Self { parts }
    }

    /// The parts in the order of the weights.
    pub fn parts(&self) -> Vec<&'a [f32]> {
        self.parts.iter().map(|&(_, part)| part).collect()
    }

    /// The gradient of weights that lie together.
    ///
    /// # Panics
    /// When they are not of one part.
    pub fn of(&self, range: Range<usize>) -> &'a [f32] {
        let mut within = self.within(range.clone());
        match (within.next(), within.next()) {
            (Some((covered, part)), None) if covered == range => part,
            _ => panic!("weights {range:?} have no gradient, or several"),
        }
    }

    /// The gradients of some weights, each with the weights that it is of.
    pub fn within(&self, range: Range<usize>) -> impl Iterator<Item = (Range<usize>, &'a [f32])> {
        let first = self.parts.partition_point(|(start, part)| start + part.len() <= range.start);
        self.parts[first..].iter().take_while(move |(start, _)| *start < range.end).map(
            move |&(start, part)| {
                let (from, to) = (range.start.max(start), range.end.min(start + part.len()));
                (from..to, &part[from - start..to - start])
            },
        )
    }

    /// All of them, one after the other.
    pub fn to_vec(&self) -> Vec<f32> {
        self.parts().concat()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_find_their_gradients() {
        let (a, b) = ([1.0, 2.0, 3.0], [4.0, 5.0]);
        let grads = Grads::new(vec![(2, &a), (7, &b)]);
        assert_eq!(grads.of(3..5), [2.0, 3.0]);
        assert_eq!(grads.of(7..9), [4.0, 5.0]);
        let within: Vec<_> = grads.within(4..8).collect();
        assert_eq!(within, [(4..5, &[3.0][..]), (7..8, &[4.0][..])]);
        assert_eq!(grads.within(5..7).count(), 0);
        assert_eq!(grads.to_vec(), [1.0, 2.0, 3.0, 4.0, 5.0]);
    }

    #[test]
    #[should_panic(expected = "have no gradient")]
    fn weights_of_two_parts_have_no_gradient_together() {
        Grads::new(vec![(0, &[1.0]), (1, &[2.0])]).of(0..2);
    }
}
