//! Rows of a table by id, and the gradient of the table.

use crate::Cpu;
use crate::copy::take_rows;
use crate::cpu::SharedMut;
use crate::rows::{self, kernel, lanes, load, load_f32, store_f32};
use crate::view::{View, ViewMut};

/// Columns per task of [`scatter_add`].
const COLUMNS: usize = 32;

/// `out[i] = w[ids[i]]`, w: [vocabulary, d], ids: [n], out: [n, d].
///
/// # Panics
/// When an id is beyond the table or the sizes do not fit.
pub fn gather(cpu: &Cpu, w: View<'_>, ids: &[u32], out: ViewMut<'_>) {
    if ids.is_empty() {
        rows::expect_len("gather", "out", out.len(), 0);
        return;
    }
    // as many rows as ids, so the quotient is the width
    let d = rows::count("gather", out.len(), ids.len());
    take_rows(cpu, w, d, ids, out);
}

kernel! {
    /// Adds columns `from..` of row i of `d_y` to those of row `ids[i]` of `d_w`, for every i in turn.
    ScatterAdd<'a>(s: S, d_y: View<'a>, ids: &'a [u32], d: usize, columns: [usize; 2], d_w: &'a SharedMut<f32>) {
        let [from, to] = columns;
        for (row, &id) in ids.iter().enumerate() {
            // SAFETY: this task alone touches these columns.
            let acc = unsafe { d_w.slice(id as usize * d + from, to - from) };
            lanes!(acc.len(), |i, n| {
                let x = load(s, d_y, row * d + from + i, n);
                store_f32(s, s.add(load_f32(s, acc, i, n), x), acc, i, n);
            });
        }
    }
}

/// Gradient of [`gather`]: `d_w[ids[i]] += d_y[i]`, i ascending, whatever the threads (tasks own columns).
///
/// `d_y`: [n, d], ids: [n], `d_w`: [vocabulary, d].
///
/// # Panics
/// When an id is beyond the table or the sizes do not fit.
pub fn scatter_add(cpu: &Cpu, d_y: View<'_>, ids: &[u32], d_w: &mut [f32]) {
    if ids.is_empty() {
        rows::expect_len("scatter_add", "d_y", d_y.len(), 0);
        return;
    }
    let d = rows::count("scatter_add", d_y.len(), ids.len());
    let there = rows::count("scatter_add", d_w.len(), d);
    if let Some(id) = ids.iter().find(|&&id| id as usize >= there) {
        panic!("scatter_add: id {id} of {there}");
    }
    let d_w = &SharedMut::new(d_w);
    rows::over_blocks(cpu, d, COLUMNS, |from, to| {
        cpu.dispatch(ScatterAdd { d_y, ids, d, columns: [from, to], d_w });
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{AWKWARD, everywhere, halve, normal};

    #[test]
    fn gathers_and_scatters_in_order() {
        for d in AWKWARD {
            for n in [0, 1, 200] {
                let vocabulary = 7;
                let ids: Vec<u32> = (0..n).map(|i| (i * i % vocabulary) as u32).collect();
                let (w, d_y) = (normal(1, vocabulary * d), halve(&normal(2, n * d)));
                let got = everywhere("gather", |cpu| {
                    let mut out = vec![0.0; n * d];
                    gather(cpu, View::F32(&w), &ids, ViewMut::F32(&mut out));
                    out
                });
                for (i, &id) in ids.iter().enumerate() {
                    assert_eq!(got[i * d..][..d], w[id as usize * d..][..d]);
                }
                let got = everywhere("scatter_add", |cpu| {
                    let mut d_w = w.clone();
                    scatter_add(cpu, View::Bf16(&d_y), &ids, &mut d_w);
                    d_w
                });
                let mut expected = w.clone();
                for (i, &id) in ids.iter().enumerate() {
                    for j in 0..d {
                        expected[id as usize * d + j] += d_y[i * d + j].to_f32();
                    }
                }
                assert_eq!(got, expected);
            }
        }
    }

    #[test]
    #[should_panic(expected = "scatter_add: id 3 of 3")]
    fn an_id_outside_panics() {
        scatter_add(&Cpu::detect(1), View::F32(&[0.0; 2]), &[3], &mut [0.0; 6]);
    }
}
