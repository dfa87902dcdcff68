//! Moving, converting and adding whole arrays, columns and rows.

use crate::Cpu;
use crate::cpu::SharedMut;
use crate::rows::{self, SharedView, kernel, lanes, load, load_f32, store, store_f32};
use crate::view::{View, ViewMut};

kernel! {
    Convert<'a>(s: S, x: View<'a>, out: ViewMut<'a>) {
        let mut out = out;
        rows::copy(s, x, 0, &mut out, 0, x.len());
    }
}

/// `out = x`, rounded to the dtype of `out`.
///
/// # Panics
/// When lengths differ.
pub fn convert(cpu: &Cpu, x: View<'_>, out: ViewMut<'_>) {
    rows::expect_len("convert", "out", out.len(), x.len());
    let shared = SharedView::new(out);
    rows::over_blocks(cpu, x.len(), rows::FLAT_TILE, |from, to| {
        // SAFETY: tasks own disjoint ranges.
        let out = unsafe { shared.slice(from, to - from) };
        cpu.dispatch(Convert { x: x.slice(from, to), out });
    });
}

kernel! {
    Add<'a>(s: S, a: View<'a>, b: View<'a>, out: ViewMut<'a>) {
        let mut out = out;
        lanes!(a.len(), |i, n| {
            store(s, s.add(load(s, a, i, n), load(s, b, i, n)), &mut out, i, n);
        });
    }
}

/// `out = a + b`, element by element.
///
/// # Panics
/// When lengths differ.
pub fn add(cpu: &Cpu, a: View<'_>, b: View<'_>, out: ViewMut<'_>) {
    rows::expect_len("add", "b", b.len(), a.len());
    rows::expect_len("add", "out", out.len(), a.len());
    let shared = SharedView::new(out);
    rows::over_blocks(cpu, a.len(), rows::FLAT_TILE, |from, to| {
        // SAFETY: tasks own disjoint ranges.
        let out = unsafe { shared.slice(from, to - from) };
        cpu.dispatch(Add { a: a.slice(from, to), b: b.slice(from, to), out });
    });
}

kernel! {
    AddInto<'a>(s: S, acc: &'a mut [f32], x: View<'a>) {
        lanes!(acc.len(), |i, n| {
            store_f32(s, s.add(load_f32(s, acc, i, n), load(s, x, i, n)), acc, i, n);
        });
    }
}

/// `acc += x`, element by element.
///
/// # Panics
/// When lengths differ.
pub fn add_into(cpu: &Cpu, acc: &mut [f32], x: View<'_>) {
    rows::expect_len("add_into", "x", x.len(), acc.len());
    let shared = SharedMut::new(acc);
    rows::over_blocks(cpu, x.len(), rows::FLAT_TILE, |from, to| {
        // SAFETY: tasks own disjoint ranges.
        let acc = unsafe { shared.slice(from, to - from) };
        cpu.dispatch(AddInto { acc, x: x.slice(from, to) });
    });
}

kernel! {
    Scale<'a>(s: S, x: View<'a>, factor: f32, out: ViewMut<'a>) {
        let mut out = out;
        lanes!(x.len(), |i, n| {
            store(s, s.mul(load(s, x, i, n), s.splat(factor)), &mut out, i, n);
        });
    }
}

/// `out = factor x`, element by element.
///
/// # Panics
/// When lengths differ.
pub fn scale_into(cpu: &Cpu, x: View<'_>, factor: f32, out: ViewMut<'_>) {
    rows::expect_len("scale_into", "out", out.len(), x.len());
    let shared = SharedView::new(out);
    rows::over_blocks(cpu, x.len(), rows::FLAT_TILE, |from, to| {
        // SAFETY: tasks own disjoint ranges.
        let out = unsafe { shared.slice(from, to - from) };
        cpu.dispatch(Scale { x: x.slice(from, to), factor, out });
    });
}

kernel! {
    /// Columns `x_at..x_at + len` of rows of `x_width` to columns from `out_at` of rows of `out_width`.
    Columns<'a>(
        s: S, x: View<'a>, x_width: usize, x_at: usize, len: usize, out: ViewMut<'a>, out_width: usize, out_at: usize,
    ) {
        let mut out = out;
        for row in 0..x.len() / x_width {
            rows::copy(s, x, row * x_width + x_at, &mut out, row * out_width + out_at, len);
        }
    }
}

/// `out[i, j] = x[i, start + j]`, x: [n, width], out: [n, len].
///
/// # Panics
/// When the columns are not in x, or `out` has another number of rows.
pub fn take_columns(cpu: &Cpu, x: View<'_>, width: usize, start: usize, len: usize, out: ViewMut<'_>) {
    let n = rows::count("take_columns", x.len(), width);
    assert!(start + len <= width, "take_columns: columns {start}+{len} of {width}");
    rows::expect_len("take_columns", "out", out.len(), n * len);
    let shared = SharedView::new(out);
    rows::over_tiles(cpu, n, len, |from, to| {
        // SAFETY: tasks own disjoint rows.
        let out = unsafe { shared.slice(from * len, (to - from) * len) };
        let x = x.slice(from * width, to * width);
        cpu.dispatch(Columns { x, x_width: width, x_at: start, len, out, out_width: len, out_at: 0 });
    });
}

/// `out[i, start + j] = x[i, j]`, x: [n, len], out: [n, width]; other columns stay as they are.
///
/// # Panics
/// When the columns are not in `out`, or x has another number of rows.
pub fn put_columns(cpu: &Cpu, x: View<'_>, len: usize, out: ViewMut<'_>, width: usize, start: usize) {
    let n = rows::count("put_columns", out.len(), width);
    assert!(start + len <= width, "put_columns: columns {start}+{len} of {width}");
    rows::expect_len("put_columns", "x", x.len(), n * len);
    if len == 0 {
        return;
    }
    let shared = SharedView::new(out);
    rows::over_tiles(cpu, n, len, |from, to| {
        // SAFETY: tasks own disjoint rows.
        let out = unsafe { shared.slice(from * width, (to - from) * width) };
        let x = x.slice(from * len, to * len);
        cpu.dispatch(Columns { x, x_width: len, x_at: 0, len, out, out_width: width, out_at: start });
    });
}

/// `out[i, to + j] = x[i, from + j]` for j below `len`, x: [n, width], out: [n, `out_width`]; other columns stay as they are.
///
/// # Panics
/// When the columns are not in x or not in `out`, or the two have different numbers of rows.
pub fn move_columns(
    cpu: &Cpu,
    (x, width, from): (View<'_>, usize, usize),
    len: usize,
    (out, out_width, to): (ViewMut<'_>, usize, usize),
) {
    let n = rows::count("move_columns", x.len(), width);
    assert!(from + len <= width, "move_columns: columns {from}+{len} of {width}");
    assert!(to + len <= out_width, "move_columns: columns {to}+{len} of {out_width}");
    rows::expect_len("move_columns", "out", out.len(), n * out_width);
    let shared = SharedView::new(out);
    rows::over_tiles(cpu, n, len, |first, end| {
        // SAFETY: tasks own disjoint rows.
        let out = unsafe { shared.slice(first * out_width, (end - first) * out_width) };
        let x = x.slice(first * width, end * width);
        cpu.dispatch(Columns { x, x_width: width, x_at: from, len, out, out_width, out_at: to });
    });
}

/// `out[i] = [a[i], b[i]]`, a: [n, da], b: [n, db], out: [n, da + db].
///
/// # Panics
/// When numbers of rows differ.
pub fn concat_columns(cpu: &Cpu, a: View<'_>, da: usize, b: View<'_>, db: usize, mut out: ViewMut<'_>) {
    put_columns(cpu, a, da, out.reborrow(), da + db, 0);
    put_columns(cpu, b, db, out, da + db, da);
}

kernel! {
    TakeRows<'a>(s: S, x: View<'a>, d: usize, rows: &'a [u32], out: ViewMut<'a>) {
        let mut out = out;
        for (to, &from) in rows.iter().enumerate() {
            rows::copy(s, x, from as usize * d, &mut out, to * d, d);
        }
    }
}

/// `out[i] = x[rows[i]]`, x: [any, d], rows: [n], out: [n, d].
///
/// # Panics
/// When a row is not in x, or `out` has another number of rows.
pub fn take_rows(cpu: &Cpu, x: View<'_>, d: usize, rows: &[u32], out: ViewMut<'_>) {
    let there = rows::count("take_rows", x.len(), d);
    if let Some(row) = rows.iter().find(|&&row| row as usize >= there) {
        panic!("take_rows: row {row} of {there}");
    }
    rows::expect_len("take_rows", "out", out.len(), rows.len() * d);
    let shared = SharedView::new(out);
    rows::over_tiles(cpu, rows.len(), d, |from, to| {
        // SAFETY: tasks own disjoint rows.
        let out = unsafe { shared.slice(from * d, (to - from) * d) };
        cpu.dispatch(TakeRows { x, d, rows: &rows[from..to], out });
    });
}

/// `out[rows[i]] = x[i]`, x: [n, d], rows: [n], ascending, out: [any, d]; other rows stay as they are.
///
/// # Panics
/// When rows do not ascend or one is not in `out`, or x has another number of rows.
pub fn put_rows(cpu: &Cpu, x: View<'_>, d: usize, rows: &[u32], out: ViewMut<'_>) {
    let there = rows::count("put_rows", out.len(), d);
    assert!(rows.is_sorted_by(|a, b| a < b), "put_rows: rows in ascending order");
    if let Some(row) = rows.last().filter(|&&row| row as usize >= there) {
        panic!("put_rows: row {row} of {there}");
    }
    rows::expect_len("put_rows", "x", x.len(), rows.len() * d);
    let shared = SharedView::new(out);
    rows::over_tiles(cpu, rows.len(), d, |from, to| {
        for (i, &row) in (from as u32..).zip(&rows[from..to]) {
            // SAFETY: rows ascend, so each is written by one task.
            let out = unsafe { shared.slice(row as usize * d, d) };
            cpu.dispatch(TakeRows { x, d, rows: &[i], out });
        }
    });
}

#[cfg(test)]
mod tests {
    use minke_num::bf16;
    use minke_num::tolerance::assert_same_bits;

    use super::*;
    use crate::testing::{AWKWARD, everywhere, halve, normal, widen};

    #[test]
    fn rows_put_back_are_where_they_were_taken() {
        for d in AWKWARD {
            let x = normal(1, 9 * d);
            let rows = [0_u32, 3, 4, 8];
            everywhere("put_rows", |cpu| {
                let (mut taken, mut back) = (vec![0.0; 4 * d], vec![7.0; 9 * d]);
                take_rows(cpu, View::F32(&x), d, &rows, ViewMut::F32(&mut taken));
                put_rows(cpu, View::F32(&taken), d, &rows, ViewMut::F32(&mut back));
                for row in 0..9 {
                    let of = row * d..(row + 1) * d;
                    let expected =
                        if rows.contains(&(row as u32)) { x[of.clone()].to_vec() } else { vec![7.0; d] };
                    assert_eq!(back[of], expected);
                }
                back
            });
        }
    }

    #[test]
    fn flat_ops_round_once() {
        for len in AWKWARD.into_iter().chain([0, 40_001]) {
            let (a, b) = (normal(1, len), normal(2, len));
            let half = halve(&b);
            let sum = everywhere("add", |cpu| {
                let mut out = vec![bf16::ZERO; len];
                add(cpu, View::F32(&a), View::Bf16(&half), ViewMut::Bf16(&mut out));
                widen(&out)
            });
            let acc = everywhere("add_into", |cpu| {
                let mut acc = a.clone();
                add_into(cpu, &mut acc, View::Bf16(&half));
                acc
            });
            let scaled = everywhere("scale_into", |cpu| {
                let mut out = vec![0.0; len];
                scale_into(cpu, View::F32(&a), 0.3, ViewMut::F32(&mut out));
                out
            });
            let rounded = everywhere("convert", |cpu| {
                let (mut out, mut back) = (vec![bf16::ZERO; len], vec![0.0; len]);
                convert(cpu, View::F32(&a), ViewMut::Bf16(&mut out));
                convert(cpu, View::Bf16(&out), ViewMut::F32(&mut back));
                back
            });
            for i in 0..len {
                let exact = a[i] + half[i].to_f32();
                assert_eq!(sum[i], bf16::from_f32(exact).to_f32());
                assert_eq!(acc[i], exact);
                assert_eq!(scaled[i], a[i] * 0.3);
                assert_eq!(rounded[i], bf16::from_f32(a[i]).to_f32());
            }
        }
    }

    #[test]
    fn columns_come_and_go() {
        for n in [0, 1, 3, 70] {
            for (da, db) in [(1, 1), (3, 17), (64, 16), (129, 31)] {
                let (a, b) = (normal(1, n * da), halve(&normal(2, n * db)));
                let both = everywhere("concat_columns", |cpu| {
                    let mut out = vec![9.0; n * (da + db)];
                    concat_columns(cpu, View::F32(&a), da, View::Bf16(&b), db, ViewMut::F32(&mut out));
                    out
                });
                for i in 0..n {
                    assert_eq!(both[i * (da + db)..][..da], a[i * da..][..da]);
                }
                let back = everywhere("take_columns", |cpu| {
                    let mut out = vec![9.0; n * db];
                    take_columns(cpu, View::F32(&both), da + db, da, db, ViewMut::F32(&mut out));
                    out
                });
                assert_same_bits("take_columns", &back, &widen(&b));
                let moved = everywhere("move_columns", |cpu| {
                    let mut out = vec![9.0; n * (db + 5)];
                    let from = (View::F32(&both), da + db, da);
                    move_columns(cpu, from, db, (ViewMut::F32(&mut out), db + 5, 3));
                    out
                });
                for (row, b) in moved.chunks(db + 5).zip(widen(&b).chunks(db)) {
                    assert_eq!(row, [&[9.0; 3], b, &[9.0; 2]].concat());
                }
            }
        }
        let mut out = [7.0; 8];
        put_columns(&Cpu::detect(1), View::F32(&[1.0, 2.0]), 1, ViewMut::F32(&mut out), 4, 2);
        assert_eq!(out, [7.0, 7.0, 1.0, 7.0, 7.0, 7.0, 2.0, 7.0]);
    }

    #[test]
    fn rows_are_taken() {
        let x = normal(1, 5 * 33);
        let rows: Vec<u32> = (0..300).map(|i| (i * 7 % 5) as u32).collect();
        let got = everywhere("take_rows", |cpu| {
            let mut out = vec![0.0; 300 * 33];
            take_rows(cpu, View::F32(&x), 33, &rows, ViewMut::F32(&mut out));
            out
        });
        for (i, &row) in rows.iter().enumerate() {
            assert_eq!(got[i * 33..][..33], x[row as usize * 33..][..33]);
        }
    }

    #[test]
    #[should_panic(expected = "take_rows: row 5 of 5")]
    fn a_row_outside_panics() {
        take_rows(&Cpu::detect(1), View::F32(&[0.0; 10]), 2, &[5], ViewMut::F32(&mut [0.0; 2]));
    }
}
