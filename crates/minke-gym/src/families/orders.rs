//! All orders of a few things, for keys that do not depend on names.

/// All orders of `0..n`, in lexicographic order.
pub fn orders(n: usize) -> Vec<Vec<usize>> {
    let mut all: Vec<Vec<usize>> = vec![Vec::new()];
    for _ in 0..n {
        let mut longer = Vec::with_capacity(all.len() * n);
        for order in &all {
            for next in (0..n).filter(|next| !order.contains(next)) {
                longer.push(order.iter().copied().chain([next]).collect());
            }
        }
        all = longer;
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_are_n_factorial() {
        assert_eq!(orders(0), [Vec::<usize>::new()]);
        assert_eq!(orders(3), [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]]);
        assert_eq!(orders(5).len(), 120);
    }
}
