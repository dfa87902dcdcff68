//! The register tile of every f32 matrix product.
//!
//! `c[i][j] (+)= sum over depth p of a[i][p] * b[p][j]`: a few rows by one or two vectors of columns, held in registers
//! while the depth runs in ascending order. Each output element is one chain of fused multiply-adds that starts from
//! zero (or from `c`), so its bits do not depend on the tile's shape or neighbours; a sum cut into blocks of depth
//! gives the same bits as one that is not, because storing and loading `c` in between is exact.

use minke_num::bf16;

use crate::simd::{LANES, Simd};

/// Columns of a packed panel: row `p` of a panel is at `p * PANEL`.
pub const PANEL: usize = 32;

/// Rows of the largest tile of any level.
pub const MAX_ROWS: usize = 14;

/// Where a tile reads and writes.
#[derive(Clone, Copy)]
pub struct Tile {
    /// Length of the sums.
    pub depth: usize,
    /// `a[i][p]` is at `a + i * a_row + p * a_step`.
    pub a: *const f32,
    /// Distance of rows of `a`.
    pub a_row: usize,
    /// Distance of depth steps of `a`.
    pub a_step: usize,
    /// `b[p][j]` is at `b + p * PANEL + j`.
    pub b: *const f32,
    /// `c[i][j]` is at `c + i * c_row + j`.
    pub c: *mut f32,
    /// Distance of rows of `c`.
    pub c_row: usize,
    /// Whether the sums start from what is in `c` rather than from zero.
    pub accumulate: bool,
}

/// A tile of a product of bf16 pairs: `c[i][j] (+)= sum over pairs p of a[i][p] . b[p][j]`, where `.`
/// adds two products into an f32 accumulator (`vdpbf16ps`), pairs in ascending order.
#[derive(Clone, Copy)]
pub struct DotTile {
    /// Length of the sums in pairs.
    pub pairs: usize,
    /// Pair `p` of row `i` is at `a + i * a_row + p * a_step`; any alignment.
    pub a: *const u32,
    /// Distance of rows of `a`, in pairs.
    pub a_row: usize,
    /// Distance of steps of `a`, in pairs.
    pub a_step: usize,
    /// Pair `p` of column `j` is at `b + p * PANEL + j`.
    pub b: *const u32,
    /// `c[i][j]` is at `c + i * c_row + j`.
    pub c: *mut f32,
    /// Distance of rows of `c`.
    pub c_row: usize,
    /// Whether the sums start from what is in `c` rather than from zero.
    pub accumulate: bool,
    /// Where not null, sums are rounded to bf16 and go to `half + i * half_row + j` instead of `c`.
    pub half: *mut bf16,
    /// Distance of rows of `half`.
    pub half_row: usize,
}

/// A few rows times a weight that lies row by row, turned over: `c[j][i] = sum over pairs p of w[j][p] . x[p][i]`, in tile
/// registers. Rows of the weight are the rows of the tile, so that they are read where they lie.
#[derive(Clone, Copy)]
pub struct RowsTile {
    /// Length of the sums in pairs, whole blocks of sixteen.
    pub pairs: usize,
    /// Pair `p` of row `j` of the weight is at `w + j * pairs + p`; any alignment.
    pub w: *const u32,
    /// Rows of the weight, up to [`LANES`].
    pub rows: usize,
    /// Pair `p` of row `i` is at `x + p * columns + i`.
    pub x: *const u32,
    /// Rows of x, up to [`GRID_ROWS`](crate::simd::GRID_ROWS).
    pub columns: usize,
    /// `c[j][i]` is at `c + j * columns + i`.
    pub c: *mut f32,
    /// What will be read next, as many bytes as this tile reads: memory is asked for it. Any address, or null.
    pub next: *const u8,
}

/// Computes `rows` (at most [`MAX_ROWS`]) by `vecs` vectors (16 columns each; 1 or 2) of a product.
///
/// # Safety
/// All that `t` addresses for these sizes must be readable, and `c` writable and not shared.
#[inline(always)]
pub unsafe fn run<S: Simd>(s: S, t: Tile, rows: usize, vecs: usize) {
    // SAFETY: by the caller's promise.
    unsafe { s.tile(t, rows, vecs) }
}

/// The body of [`Simd::tile`]: compiled once per level, because it is large and every product calls it.
///
/// # Safety
/// As for [`run`].
#[inline(always)]
pub(crate) unsafe fn body<S: Simd>(s: S, t: Tile, rows: usize, vecs: usize) {
    // SAFETY: by the caller's promise; each call below covers a disjoint part of the same tile.
    unsafe {
        if S::TILE_VECS == 2 && vecs == 2 {
            run_rows::<S, 2>(s, t, rows);
        } else {
            for v in 0..vecs {
                let part = Tile { b: t.b.add(v * LANES), c: t.c.add(v * LANES), ..t };
                run_rows::<S, 1>(s, part, rows);
            }
        }
    }
}

#[inline(always)]
unsafe fn run_rows<S: Simd, const VECS: usize>(s: S, t: Tile, rows: usize) {
    // SAFETY: by the caller's promise.
    unsafe {
        let mut done = 0;
        while done < rows {
            let now = (rows - done).min(S::TILE_ROWS);
            let part = Tile { a: t.a.add(done * t.a_row), c: t.c.add(done * t.c_row), ..t };
            macro_rules! of_rows {
                ($($n:literal)*) => {
                    match now {
                        $($n => if $n <= S::TILE_ROWS { fixed::<S, $n, VECS>(s, part) },)*
                        _ => unreachable!("a tile has at most 14 rows"),
                    }
                };
            }
            of_rows!(1 2 3 4 5 6 7 8 9 10 11 12 13 14);
            done += now;
        }
    }
}

#[inline(always)]
unsafe fn fixed<S: Simd, const ROWS: usize, const VECS: usize>(s: S, t: Tile) {
    // SAFETY: by the caller's promise.
    unsafe {
        let mut acc = [[s.zero(); VECS]; ROWS];
        if t.accumulate {
            for (i, row) in acc.iter_mut().enumerate() {
                for (v, x) in row.iter_mut().enumerate() {
                    *x = s.load(&*t.c.add(i * t.c_row + v * LANES).cast());
                }
            }
        }
        // a copy of the loop for packed columns, whose rows are next to each other: addresses become constants
        if t.a_row == 1 {
            for p in 0..t.depth {
                step::<S, ROWS, VECS>(s, &mut acc, t.a.add(p * t.a_step), 1, t.b.add(p * PANEL));
            }
        } else {
            for p in 0..t.depth {
                step::<S, ROWS, VECS>(s, &mut acc, t.a.add(p * t.a_step), t.a_row, t.b.add(p * PANEL));
            }
        }
        for (i, row) in acc.iter().enumerate() {
            for (v, &x) in row.iter().enumerate() {
                s.store(x, &mut *t.c.add(i * t.c_row + v * LANES).cast());
            }
        }
    }
}

#[inline(always)]
unsafe fn step<S: Simd, const ROWS: usize, const VECS: usize>(
    s: S,
    acc: &mut [[S::V; VECS]; ROWS],
    a: *const f32,
    a_row: usize,
    b: *const f32,
) {
    // SAFETY: by the caller's promise.
    unsafe {
        let b: [S::V; VECS] = std::array::from_fn(|v| s.load(&*b.add(v * LANES).cast()));
        for (i, row) in acc.iter_mut().enumerate() {
            let x = s.splat(*a.add(i * a_row));
            for (sum, &b) in row.iter_mut().zip(&b) {
                *sum = s.fma(x, b, *sum);
            }
        }
    }
}
