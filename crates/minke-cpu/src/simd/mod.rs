//! One vector of sixteen f32 lanes, on every instruction set.
//!
//! An algorithm is written once, as a [`Kernel`], over [`Simd`]; [`Level::dispatch`] runs the copy compiled for the
//! level. Because the vector has sixteen lanes everywhere (one AVX-512 register, two of AVX2, four of NEON, an array
//! in scalar code), reductions add in the same order everywhere, and f32 kernels give the same bits on every level.
//!
//! Invariant: a witness (`Avx512`, `Avx2`, ...) exists only where its instructions do. They are private to this
//! module and made in [`Level::dispatch`] alone, and a [`Level`] other than `Scalar` comes from detection alone.

#[cfg(target_arch = "x86_64")]
mod amx;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
mod bytes256;
#[cfg(target_arch = "aarch64")]
mod bytes_neon;
#[cfg(target_arch = "aarch64")]
mod neon;
mod scalar;
#[cfg(target_arch = "x86_64")]
mod vnni;

use minke_num::{bf16, fp8};

use crate::gemm::tile::{DotTile, RowsTile, Tile};
use crate::stored::panels::{Panel, PanelTile};
use crate::stored::tile::BytesTile;

/// Lanes of a vector, on every level.
pub const LANES: usize = 16;

/// Rows of the largest product in tile registers.
pub const GRID_ROWS: usize = 32;

/// Pairs of depth that one instruction on tile registers takes.
pub const GRID_STEPS: usize = 16;

/// The f16 of two bytes, exactly; infinity and NaN too.
#[inline(always)]
pub(crate) fn half(bytes: [u8; 2]) -> f32 {
    let bits = u32::from(u16::from_le_bytes(bytes));
    let size = bits & 0x7fff;
    let size = match size >> 10 {
        // a product with a subnormal f32, which would do for these as well, takes a hundred cycles on x86
        0 => (size as f32 * f32::from_bits(0x3380_0000)).to_bits(),
        31 => size << 13 | 0x7f80_0000,
        _ => (size << 13) + (112 << 23),
    };
    f32::from_bits(size | (bits & 0x8000) << 16)
}

/// Sixteen f32 lanes and what kernels do with them. `self` is the witness that the instructions exist.
pub trait Simd: Copy + Send + Sync + 'static {
    /// The vector.
    type V: Copy;
    /// 64 bytes.
    type B: Copy;
    /// Rows of the matrix-product tile that fit the registers beside [`Simd::TILE_VECS`] columns of vectors.
    const TILE_ROWS: usize;
    /// Vectors per row of that tile: 2 where there are 32 wide registers, else 1.
    const TILE_VECS: usize;
    /// Whether [`Simd::dot_tile`] exists here.
    const DOT: bool = false;
    /// Whether [`Simd::grid_tile`] exists here; [`Simd::DOT`] is true then.
    const GRID: bool = false;

    /// One register tile of a product; see [`crate::gemm::tile::run`].
    ///
    /// # Safety
    /// All that the tile addresses must be readable, `c` writable.
    unsafe fn tile(self, tile: Tile, rows: usize, vecs: usize);

    /// One tile of a product of bf16 pairs, `vecs` (1 or 2) vectors wide; see [`crate::gemm::tile::DotTile`].
    ///
    /// # Safety
    /// [`Simd::DOT`] must be true, and all that the tile addresses for these sizes readable, `c` and `half` writable.
    unsafe fn dot_tile(self, _tile: DotTile, _rows: usize, _vecs: usize) {
        unreachable!("a bf16 dot product on a level without one")
    }

    /// Rows up to which [`Simd::dot_tile_of_two`] exists here: a tile of so few waits for its own sums.
    const DOT_OF_TWO: usize = 0;

    /// [`Simd::dot_tile`] over the panel of the tile and one at `next`, 3 or 4 vectors.
    ///
    /// # Safety
    /// As for [`Simd::dot_tile`], of up to [`Simd::DOT_OF_TWO`] rows.
    unsafe fn dot_tile_of_two(self, _tile: DotTile, _next: *const u32, _rows: usize, _vecs: usize) {
        unreachable!("two panels at once on a level that does not have them")
    }

    /// One step of [`Simd::dot_tile`]: `sums[i] + a[i] . b[i]`. Exists where [`Simd::DOT`] is.
    fn add_pairs(self, _sums: Self::V, _a: Self::V, _b: Self::V) -> Self::V {
        unreachable!("a bf16 dot product on a level without one")
    }

    /// Like [`Simd::dot_tile`] in tile registers: up to [`GRID_ROWS`] rows, [`DotTile::a_step`] 1, [`DotTile::pairs`] in
    /// whole blocks of [`GRID_STEPS`], whose order of summation is the unit's own. Up to half the rows take half a block,
    /// which gives the bits of a whole one filled with zeros.
    ///
    /// # Safety
    /// [`Simd::GRID`] must be true, and all that the tile addresses for these sizes readable, `c` and `half` writable.
    unsafe fn grid_tile(self, _tile: DotTile, _rows: usize, _vecs: usize) {
        unreachable!("a product in tile registers on a level without them")
    }

    /// [`Simd::grid_tile`] over the panel of the tile and one at `next`: up to half the rows by 3 or 4 vectors, with sums
    /// in f32.
    ///
    /// # Safety
    /// As for [`Simd::grid_tile`].
    unsafe fn grid_tile_of_two(self, _tile: DotTile, _next: *const u32, _rows: usize, _vecs: usize) {
        unreachable!("a product in tile registers on a level without them")
    }

    /// The product of a few rows with rows of a weight where they lie: the bits of [`Simd::grid_tile`].
    ///
    /// # Safety
    /// As for [`Simd::grid_tile`].
    unsafe fn grid_rows(self, _tile: RowsTile) {
        unreachable!("a product in tile registers on a level without them")
    }

    /// 32 values, rounded to bf16, as sixteen words of neighbours: word `i` holds values `2 i` (low half) and `2 i + 1`.
    /// What [`Simd::dot_tile`] reads along the depth; like it, takes subnormals for zero. Exists where [`Simd::DOT`] is.
    fn pairs_along(self, _first: Self::V, _second: Self::V) -> Self::V {
        unreachable!("bf16 pairs on a level without their product")
    }

    /// [`Simd::pairs_along`] of values that are bf16 already.
    fn pairs_along_bf16(self, _x: &[bf16; 2 * LANES]) -> Self::V {
        unreachable!("bf16 pairs on a level without their product")
    }

    /// Two rows of sixteen values, rounded to bf16, as sixteen words: word `i` holds `low[i]` and `high[i]`. See
    /// [`Simd::pairs_along`].
    fn pairs_across(self, _low: Self::V, _high: Self::V) -> Self::V {
        unreachable!("bf16 pairs on a level without their product")
    }

    /// [`Simd::pairs_across`] of values that are bf16 already.
    fn pairs_across_bf16(self, _low: &[bf16; LANES], _high: &[bf16; LANES]) -> Self::V {
        unreachable!("bf16 pairs on a level without their product")
    }

    /// [`Simd::pairs_across`] of values that bf16 has.
    #[inline(always)]
    fn pairs_across_exact(self, low: Self::V, high: Self::V) -> Self::V {
        self.pairs_across(low, high)
    }

    /// [`Simd::pairs_across_bf16`] of 32 values, in two vectors.
    fn pairs_across_panel(self, _low: &[bf16; 2 * LANES], _high: &[bf16; 2 * LANES]) -> [Self::V; 2] {
        unreachable!("bf16 pairs on a level without their product")
    }

    /// Eight columns of 32 rows, from column `at` on, turned over: word `p` of vector `j` holds element `j` of rows `2 p` (low half) and
    /// `2 p + 1`. Exists where [`Simd::GRID`] is.
    ///
    /// # Safety
    /// Each row must have eight elements from there.
    unsafe fn turned_bf16(self, _rows: &[*const bf16; 2 * LANES], _at: usize) -> [Self::V; 8] {
        unreachable!("turned pairs on a level without tile registers")
    }

    /// Sums of products within sixteen blocks of sixteen or 32 elements each, as whole numbers; see [`crate::stored`]. Blocks of
    /// sixteen are in the first four vectors. `offset` times the blocks' `sums` of `x` is subtracted: bytes are below 64, or
    /// their offset is 128.
    ///
    /// # Panics
    /// When `x` has neither 256 nor 512 elements.
    #[inline(always)]
    fn block_dots(self, q: [Self::B; 8], x: &[i8], offset: u8, sums: Self::V) -> Self::V {
        block_dots(self, q, x, offset, sums)
    }

    /// All bytes `x`.
    fn bytes_of(self, x: u8) -> Self::B;
    /// 64 bytes, from two places.
    fn load_halves(self, low: &[u8; 32], high: &[u8; 32]) -> Self::B;
    /// 64 bytes: sixteen twice, and sixteen others twice.
    fn load_quarters(self, low: &[u8; 16], high: &[u8; 16]) -> Self::B;
    /// 64 bytes.
    fn store_bytes(self, x: Self::B, out: &mut [u8; 64]);
    /// The low or the high half.
    #[inline(always)]
    fn store_half<const HIGH: bool>(self, x: Self::B, out: &mut [u8; 32]) {
        let mut all = [0; 64];
        self.store_bytes(x, &mut all);
        out.copy_from_slice(if HIGH { &all[32..] } else { &all[..32] });
    }
    /// `a - b`, modulo 256.
    fn sub_bytes(self, a: Self::B, b: Self::B) -> Self::B;
    /// `a & b`
    fn and_bytes(self, a: Self::B, b: Self::B) -> Self::B;
    /// `a | b`
    fn or_bytes(self, a: Self::B, b: Self::B) -> Self::B;
    /// `a ^ b`
    fn xor_bytes(self, a: Self::B, b: Self::B) -> Self::B;
    /// Numbers of eight bytes shifted right, in each quarter by its own number of bits.
    fn shift_quarters(self, x: Self::B, by: [u32; 4]) -> Self::B;
    /// Numbers of eight bytes shifted left.
    fn shift_left(self, x: Self::B, by: u32) -> Self::B;
    /// Bytes `x` where the bits are set, in their order, and 0 elsewhere.
    fn bytes_where(self, bits: u64, x: u8) -> Self::B;
    /// `table[x]` for each byte, all below 16.
    fn lookup(self, table: &[u8; 16], x: Self::B) -> Self::B;

    /// Sixteen bytes as numbers.
    #[inline(always)]
    fn load_u8(self, x: [u64; 2]) -> Self::V {
        let (low, high) = (x[0].to_le_bytes(), x[1].to_le_bytes());
        self.load(&std::array::from_fn(|i| f32::from(if i < 8 { low[i] } else { high[i - 8] })))
    }

    /// Eight lanes of each.
    #[inline(always)]
    fn halves(self, low: f32, high: f32) -> Self::V {
        self.load(&std::array::from_fn(|i| if i < 8 { low } else { high }))
    }

    /// Rows of a product of bytes up to which each stored row is unpacked for itself; no bit depends on it.
    const FEW_ROWS: usize = 12;
    /// Whether tiles of bytes read signed ones, from which this offset was subtracted.
    #[inline(always)]
    fn signed_bytes(_offset: u8) -> bool {
        false
    }

    /// Whether [`Simd::bytes_tile`] asks memory for [`BytesTile::next`].
    const BYTES_TILE_ASKS: bool = false;

    /// A tile of a product of bytes; see [`crate::stored::tile`].
    ///
    /// # Safety
    /// All that the tile addresses must be readable, `out` writable.
    #[inline(always)]
    unsafe fn bytes_tile(self, tile: BytesTile) {
        // SAFETY: by the caller's promise.
        unsafe { crate::stored::tile::body(self, tile) }
    }

    /// Whether products of bytes are faster with stored rows laid in panels ([`crate::stored::panels`]).
    const PANELS: bool = false;

    /// A tile of a product of `M` rows with a panel, where [`Simd::PANELS`] is true; see [`crate::stored::panels`].
    ///
    /// # Safety
    /// All that the tile addresses must be readable, `out` writable.
    #[inline(always)]
    unsafe fn panel_tile<F: Panel, const M: usize>(self, _: PanelTile) {
        unreachable!("a level without panels")
    }

    /// Sixteen numbers of magnitude up to 127.5, rounded (ties to even), as bytes; returns their sum.
    #[inline(always)]
    fn store_i8(self, x: Self::V, out: &mut [i8; LANES]) -> i32 {
        let mut full = [0.0; LANES];
        self.store(self.round(x), &mut full);
        for (out, x) in out.iter_mut().zip(full) {
            *out = x as i8;
        }
        out.iter().map(|&x| i32::from(x)).sum()
    }

    /// Sixteen signed bytes as numbers.
    #[inline(always)]
    fn load_i8(self, x: &[i8; LANES]) -> Self::V {
        self.load(&x.map(f32::from))
    }

    /// An f16 in all lanes, exactly.
    #[inline(always)]
    fn splat_f16(self, x: [u8; 2]) -> Self::V {
        self.splat(half(x))
    }

    /// Eight lanes of each of two f16, exactly.
    #[inline(always)]
    fn halves_f16(self, low: [u8; 2], high: [u8; 2]) -> Self::V {
        self.halves(half(low), half(high))
    }

    /// Sixteen f16, exactly.
    #[inline(always)]
    fn load_f16(self, x: [u64; 4]) -> Self::V {
        let bits = |i: usize| (x[i / 4] >> (16 * (i % 4))) as u16;
        self.load(&std::array::from_fn(|i| minke_num::f16::from_bits(bits(i)).to_f32()))
    }

    /// Sixteen values of magnitude up to 448 as E4M3 codes (nearest, ties to even); see [`fp8`].
    #[inline(always)]
    fn store_e4m3(self, x: Self::V, out: &mut [u8; LANES]) {
        let mut full = [0.0; LANES];
        self.store(x, &mut full);
        for (code, x) in out.iter_mut().zip(full) {
            *code = fp8::e4m3_from_f32(x);
        }
    }

    /// Sixteen E4M3 codes as values.
    #[inline(always)]
    fn load_e4m3(self, codes: &[u8; LANES]) -> Self::V {
        let mut full = [0.0; LANES];
        for (x, &code) in full.iter_mut().zip(codes) {
            *x = fp8::e4m3_to_f32(code);
        }
        self.load(&full)
    }

    /// 32 E4M3 codes as values, in two vectors.
    #[inline(always)]
    fn load_e4m3_panel(self, codes: &[u8; 2 * LANES]) -> [Self::V; 2] {
        let (first, second) = codes.split_at(LANES);
        let (first, second) = (first.try_into().expect("sixteen"), second.try_into().expect("sixteen"));
        [self.load_e4m3(first), self.load_e4m3(second)]
    }

    /// Values of magnitude up to 448 rounded to those that E4M3 has, as [`Simd::store_e4m3`] rounds them.
    #[inline(always)]
    fn round_e4m3(self, x: Self::V) -> Self::V {
        let mut codes = [0; LANES];
        self.store_e4m3(x, &mut codes);
        self.load_e4m3(&codes)
    }

    /// 32 E4M3 codes as words of neighbours; see [`Simd::pairs_along`].
    #[inline(always)]
    fn pairs_along_e4m3(self, codes: &[u8; 2 * LANES]) -> Self::V {
        let (first, second) = codes.split_at(LANES);
        let (first, second) = (first.try_into().expect("sixteen"), second.try_into().expect("sixteen"));
        self.pairs_along(self.load_e4m3(first), self.load_e4m3(second))
    }

    /// The larger of `most` and `|x|` per lane, `most` not negative; infinity is larger than any number and NaN than
    /// infinity, as their bits are.
    #[inline(always)]
    fn max_size(self, most: Self::V, x: Self::V) -> Self::V {
        let (mut a, mut b) = ([0.0; LANES], [0.0; LANES]);
        self.store(most, &mut a);
        self.store(x, &mut b);
        for (a, b) in a.iter_mut().zip(b) {
            *a = f32::from_bits(a.to_bits().max(b.to_bits() & 0x7fff_ffff));
        }
        self.load(&a)
    }

    /// The largest lane of what [`Simd::max_size`] made.
    #[inline(always)]
    fn max_size_lane(self, most: Self::V) -> f32 {
        let mut all = [0.0; LANES];
        self.store(most, &mut all);
        f32::from_bits(all.iter().fold(0, |most, x| most.max(x.to_bits())))
    }

    /// All lanes `x`.
    fn splat(self, x: f32) -> Self::V;
    /// Sixteen values.
    fn load(self, x: &[f32; LANES]) -> Self::V;
    /// Stores sixteen values.
    fn store(self, x: Self::V, out: &mut [f32; LANES]);
    /// Sixteen bf16 values, widened exactly.
    fn load_bf16(self, x: &[bf16; LANES]) -> Self::V;
    /// Stores sixteen values rounded to bf16 (nearest, ties to even; NaN stays NaN).
    fn store_bf16(self, x: Self::V, out: &mut [bf16; LANES]);
    /// `a + b`
    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a - b`
    fn sub(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a * b`
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a / b`
    fn div(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a * b + c`, rounded once.
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// The larger of each pair; `b` where either is NaN.
    fn max(self, a: Self::V, b: Self::V) -> Self::V;
    /// The smaller of each pair; `b` where either is NaN.
    fn min(self, a: Self::V, b: Self::V) -> Self::V;
    /// The square root.
    fn sqrt(self, a: Self::V) -> Self::V;
    /// The nearest whole number, ties to even.
    fn round(self, a: Self::V) -> Self::V;
    /// `if a < b { x } else { y }` per lane.
    fn select_lt(self, a: Self::V, b: Self::V, x: Self::V, y: Self::V) -> Self::V;
    /// `p 2^n`, exactly, where it is a normal number; `t` is the whole number `n` plus [`WHOLE`].
    fn times_power(self, p: Self::V, t: Self::V) -> Self::V;
    /// `1 / x` to an eighth, for `x` from 2^-126 to 2^126.
    fn reciprocal_guess(self, x: Self::V) -> Self::V;
    /// The sum of the lanes: i + (i+8), then + 4, + 2, + 1.
    fn sum(self, a: Self::V) -> f32;
    /// [`Simd::sum`] of each.
    #[inline(always)]
    fn sums(self, a: [Self::V; 4]) -> [f32; 4] {
        a.map(|a| self.sum(a))
    }
    /// The `i`-th of `OF` equal parts, and zero in the other lanes.
    #[inline(always)]
    fn portion<const OF: usize>(self, x: Self::V, i: usize) -> Self::V {
        let (mut full, mut part) = ([0.0; LANES], [0.0; LANES]);
        self.store(x, &mut full);
        part[..LANES / OF].copy_from_slice(&full[i * (LANES / OF)..][..LANES / OF]);
        self.load(&part)
    }
    /// The largest lane.
    fn max_lane(self, a: Self::V) -> f32;

    /// Hints that the cache line of `at`, which may be any address, will be read soon; does nothing where there is no such hint.
    #[inline(always)]
    fn prefetch<T>(self, _at: *const T) {}

    /// All lanes zero.
    #[inline(always)]
    fn zero(self) -> Self::V {
        self.splat(0.0)
    }

    /// Up to sixteen values; missing lanes are `fill`.
    #[inline(always)]
    fn load_part(self, x: &[f32], fill: f32) -> Self::V {
        let mut full = [fill; LANES];
        full[..x.len()].copy_from_slice(x);
        self.load(&full)
    }

    /// Stores the first lanes, as many as `out` has.
    #[inline(always)]
    fn store_part(self, x: Self::V, out: &mut [f32]) {
        let mut full = [0.0; LANES];
        self.store(x, &mut full);
        let n = out.len();
        out.copy_from_slice(&full[..n]);
    }

    /// [`Simd::load_part`] of bf16; missing lanes are zero.
    #[inline(always)]
    fn load_part_bf16(self, x: &[bf16]) -> Self::V {
        let mut full = [bf16::ZERO; LANES];
        full[..x.len()].copy_from_slice(x);
        self.load_bf16(&full)
    }

    /// [`Simd::store_part`], rounded as [`Simd::store_bf16`] does.
    #[inline(always)]
    fn store_part_bf16(self, x: Self::V, out: &mut [bf16]) {
        let mut full = [bf16::ZERO; LANES];
        self.store_bf16(x, &mut full);
        let n = out.len();
        out.copy_from_slice(&full[..n]);
    }

    /// Sixteen rows of sixteen turned over: lane `j` of row `i` becomes lane `i` of row `j`.
    #[inline(always)]
    fn transpose(self, rows: [Self::V; LANES]) -> [Self::V; LANES] {
        let mut from = [[0.0; LANES]; LANES];
        for (row, out) in rows.into_iter().zip(&mut from) {
            self.store(row, out);
        }
        let mut out = rows;
        for (j, out) in out.iter_mut().enumerate() {
            let mut column = [0.0; LANES];
            for (x, row) in column.iter_mut().zip(&from) {
                *x = row[j];
            }
            *out = self.load(&column);
        }
        out
    }

    /// `x` rounded to bf16 and widened again.
    #[inline(always)]
    fn round_bf16(self, x: Self::V) -> Self::V {
        let mut half = [bf16::ZERO; LANES];
        self.store_bf16(x, &mut half);
        self.load_bf16(&half)
    }

    /// `e^x`, with a relative error below 3e-7; 0 below -87.3, capped near 3e38 above 88.3; NaN stays NaN.
    ///
    /// `e^x = 2^n e^r`, n the nearest whole number to x / ln 2, r in two pieces (Cody and Waite), e^r by a polynomial
    /// of degree 6. Our own, so that every level and every libm gives the same bits.
    #[inline(always)]
    fn exp(self, x: Self::V) -> Self::V {
        let (low, whole) = (self.splat(-87.3), self.splat(WHOLE));
        let clamped = self.min(self.max(x, low), self.splat(88.3));
        let t = self.fma(clamped, self.splat(std::f32::consts::LOG2_E), whole);
        let n = self.sub(t, whole);
        let r = self.fma(n, self.splat(-0.693_359_4), clamped);
        let r = self.fma(n, self.splat(2.121_944_4e-4), r);
        let mut p = self.splat(1.0 / 720.0);
        for c in [1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
            p = self.fma(p, r, self.splat(c));
        }
        // zero, or NaN: the order keeps it
        let below = self.max(self.zero(), x);
        self.select_lt(low, x, self.times_power(p, t), below)
    }

    /// `1 / (1 + e^-x)`, with a relative error below 4e-7; at least e^-87. NaN stays NaN.
    ///
    /// The quotient by three steps of Newton, which are much faster than a division.
    #[inline(always)]
    fn sigmoid(self, x: Self::V) -> Self::V {
        let one = self.splat(1.0);
        // the order keeps NaN
        let e = self.exp(self.min(self.splat(87.0), self.sub(self.zero(), x)));
        let y = self.sub(self.splat(-1.0), e);
        let mut r = self.reciprocal_guess(self.add(one, e));
        for _ in 0..3 {
            r = self.fma(r, self.fma(y, r, one), r);
        }
        r
    }

    /// `(e^x - e^-x) / (e^x + e^-x)`, with a relative error below 2e-6; NaN stays NaN.
    ///
    /// Below 5/8 an odd polynomial of degree 11 (relative error 2e-8), beyond it `2 sigmoid(2 x) - 1`.
    #[inline(always)]
    fn tanh(self, x: Self::V) -> Self::V {
        let two = self.splat(2.0);
        let far = self.fma(two, self.sigmoid(self.mul(two, x)), self.splat(-1.0));
        let z = self.mul(x, x);
        let mut p = self.splat(-0.006_045_165);
        for c in [0.020_961_33, -0.053_843_264, 0.133_327_19, -0.333_333_28] {
            p = self.fma(p, z, self.splat(c));
        }
        let near = self.fma(self.mul(x, z), p, x);
        self.select_lt(z, self.splat(0.390_625), near, far)
    }
}

/// Added to a number of less than 2^22, it leaves the nearest whole number (ties to even) in the lowest bits.
pub const WHOLE: f32 = 12_582_912.0;

/// Less the bits of a number: those of about its reciprocal.
const RECIPROCAL: u32 = 0x7ef3_11c7;

/// [`Simd::block_dots`] in plain arithmetic.
#[inline(always)]
fn block_dots<S: Simd>(s: S, q: [S::B; 8], x: &[i8], offset: u8, sums: S::V) -> S::V {
    let block = x.len() / LANES;
    assert!((block == 16 || block == 32) && x.len() == LANES * block);
    let mut all = [[0; 64]; 8];
    for (q, out) in q.into_iter().zip(&mut all) {
        s.store_bytes(q, out);
    }
    let mut dots = [0.0; LANES];
    for ((dot, q), x) in dots.iter_mut().zip(all.as_flattened().chunks(block)).zip(x.chunks(block)) {
        *dot = q.iter().zip(x).map(|(&q, &x)| i32::from(q) * i32::from(x)).sum::<i32>() as f32;
    }
    s.fma(s.splat(-f32::from(offset)), sums, s.load(&dots))
}

/// An algorithm over [`Simd`], with its arguments as fields. `run` must be `#[inline(always)]`, and so must all that
/// it calls with the witness: only then is it compiled with the level's instructions.
pub trait Kernel {
    /// What it returns.
    type Out;
    /// The algorithm.
    fn run<S: Simd>(self, s: S) -> Self::Out;
}

/// An instruction-set level. Values other than `Scalar` exist only on machines that have it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Level(Kind);

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Kind {
    Scalar,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx2Vnni,
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Avx512Vnni,
    #[cfg(target_arch = "x86_64")]
    Avx512Bf16,
    #[cfg(target_arch = "x86_64")]
    Amx,
    #[cfg(target_arch = "aarch64")]
    Neon,
    #[cfg(target_arch = "aarch64")]
    NeonDot,
}

impl Level {
    /// Plain Rust, on any machine.
    pub const SCALAR: Level = Level(Kind::Scalar);

    /// The levels that this machine has, the best last.
    pub fn available() -> Vec<Level> {
        #[cfg_attr(not(any(target_arch = "x86_64", target_arch = "aarch64")), expect(unused_mut))]
        let mut levels = vec![Level::SCALAR];
        #[cfg(target_arch = "x86_64")]
        {
            let has_avx2 = is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c");
            if has_avx2 {
                levels.push(Level(Kind::Avx2));
                if is_x86_feature_detected!("avxvnni") {
                    levels.push(Level(Kind::Avx2Vnni));
                }
                let wide = is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl");
                if wide {
                    levels.push(Level(Kind::Avx512));
                    if is_x86_feature_detected!("avx512vnni") {
                        levels.push(Level(Kind::Avx512Vnni));
                        if is_x86_feature_detected!("avx512bf16") {
                            levels.push(Level(Kind::Avx512Bf16));
                            if amx::allowed() && amx::has_bytes() {
                                levels.push(Level(Kind::Amx));
                            }
                        }
                    }
                }
            }
        }
        #[cfg(target_arch = "aarch64")]
        if std::arch::is_aarch64_feature_detected!("neon") {
            levels.push(Level(Kind::Neon));
            if std::arch::is_aarch64_feature_detected!("dotprod") {
                levels.push(Level(Kind::NeonDot));
            }
        }
        levels
    }

    /// The best level of this machine.
    pub fn detect() -> Level {
        Self::available().pop().unwrap_or(Level::SCALAR)
    }

    /// The name that `--level` and figures use.
    pub fn name(self) -> &'static str {
        match self.0 {
            Kind::Scalar => "scalar",
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2 => "avx2",
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2Vnni => "avx2-vnni",
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512 => "avx512",
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512Vnni => "avx512-vnni",
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512Bf16 => "avx512-bf16",
            #[cfg(target_arch = "x86_64")]
            Kind::Amx => "amx-bf16",
            #[cfg(target_arch = "aarch64")]
            Kind::Neon => "neon",
            #[cfg(target_arch = "aarch64")]
            Kind::NeonDot => "neon-dot",
        }
    }

    /// Whether products of bf16 pairs run in one instruction (`vdpbf16ps`). Elsewhere bf16 operands are widened and
    /// multiplied in f32: exact products, f32 speed.
    pub fn has_bf16_dot(self) -> bool {
        match self.0 {
            Kind::Scalar => false,
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2 | Kind::Avx2Vnni | Kind::Avx512 | Kind::Avx512Vnni => false,
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512Bf16 | Kind::Amx => true,
            #[cfg(target_arch = "aarch64")]
            Kind::Neon | Kind::NeonDot => false,
        }
    }

    /// Whether matrix products of bf16 run in tile registers (AMX).
    pub fn has_grid(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        return self.0 == Kind::Amx;
        #[cfg(not(target_arch = "x86_64"))]
        return false;
    }

    /// Runs `kernel` compiled for this level.
    #[inline]
    pub fn dispatch<K: Kernel>(self, kernel: K) -> K::Out {
        match self.0 {
            Kind::Scalar => kernel.run(scalar::Scalar),
            // SAFETY (all below): the level came from detection, so its instructions exist.
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2 | Kind::Avx2Vnni => unsafe { avx2::run(kernel) },
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512 | Kind::Avx512Vnni | Kind::Avx512Bf16 | Kind::Amx => unsafe { avx512::run(kernel) },
            #[cfg(target_arch = "aarch64")]
            Kind::Neon | Kind::NeonDot => unsafe { neon::run(kernel) },
        }
    }

    /// Copies what will not be read for long, around the caches where the machine has tile registers: then lines are not read
    /// before they are written.
    pub fn put_away(self, from: &[u8], to: &mut [u8]) {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the level came from detection, so its instructions exist.
            Kind::Amx => unsafe { avx512::put_away(from, to) },
            _ => to.copy_from_slice(from),
        }
    }

    /// Like [`Level::dispatch`], for matrix products: with the dot products of bf16 and of bytes where they exist.
    #[inline]
    pub fn dispatch_product<K: Kernel>(self, kernel: K) -> K::Out {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            // SAFETY (all): the level came from detection, so its instructions exist.
            Kind::Avx2Vnni => unsafe { avx2::run_vnni(kernel) },
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512Vnni => unsafe { avx512::run_vnni(kernel) },
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512Bf16 => unsafe { avx512::run_dot(kernel) },
            #[cfg(target_arch = "x86_64")]
            Kind::Amx => unsafe { avx512::run_grid(kernel) },
            #[cfg(target_arch = "aarch64")]
            Kind::NeonDot => unsafe { neon::run_dot(kernel) },
            _ => self.dispatch(kernel),
        }
    }
}

#[cfg(test)]
mod tests;
