//! Sixteen lanes as an array: the level that every machine has, and the twin that the others are tested against.

use minke_num::bf16;

use crate::gemm::tile::Tile;

use super::{LANES, RECIPROCAL, Simd};

#[derive(Clone, Copy)]
pub struct Scalar;

type V = [f32; LANES];

#[inline(always)]
fn map2(a: V, b: V, f: impl Fn(f32, f32) -> f32) -> V {
    std::array::from_fn(|i| f(a[i], b[i]))
}

/// The register tile of this level.
#[inline(never)]
unsafe fn product_tile(tile: Tile, rows: usize, vecs: usize) {
    // SAFETY: by the promise of the caller of `tile`.
    unsafe { crate::gemm::tile::body(Scalar, tile, rows, vecs) }
}

impl Simd for Scalar {
    type V = V;
    type B = [u64; 8];
    const TILE_ROWS: usize = 4;
    const TILE_VECS: usize = 1;

    #[inline(always)]
    unsafe fn tile(self, tile: Tile, rows: usize, vecs: usize) {
        // SAFETY: the witness says that the instructions exist; the rest is the caller's promise.
        unsafe { product_tile(tile, rows, vecs) }
    }

    #[inline(always)]
    fn splat(self, x: f32) -> V {
        [x; LANES]
    }
    #[inline(always)]
    fn load(self, x: &[f32; LANES]) -> V {
        *x
    }
    #[inline(always)]
    fn store(self, x: V, out: &mut [f32; LANES]) {
        *out = x;
    }
    #[inline(always)]
    fn load_bf16(self, x: &[bf16; LANES]) -> V {
        x.map(bf16::to_f32)
    }
    #[inline(always)]
    fn store_bf16(self, x: V, out: &mut [bf16; LANES]) {
        *out = x.map(bf16::from_f32);
    }
    #[inline(always)]
    fn add(self, a: V, b: V) -> V {
        map2(a, b, |x, y| x + y)
    }
    #[inline(always)]
    fn sub(self, a: V, b: V) -> V {
        map2(a, b, |x, y| x - y)
    }
    #[inline(always)]
    fn mul(self, a: V, b: V) -> V {
        map2(a, b, |x, y| x * y)
    }
    #[inline(always)]
    fn div(self, a: V, b: V) -> V {
        map2(a, b, |x, y| x / y)
    }
    #[inline(always)]
    fn fma(self, a: V, b: V, c: V) -> V {
        std::array::from_fn(|i| a[i].mul_add(b[i], c[i]))
    }
    #[inline(always)]
    fn max(self, a: V, b: V) -> V {
        map2(a, b, |x, y| if x > y { x } else { y })
    }
    #[inline(always)]
    fn min(self, a: V, b: V) -> V {
        map2(a, b, |x, y| if x < y { x } else { y })
    }
    #[inline(always)]
    fn sqrt(self, a: V) -> V {
        a.map(f32::sqrt)
    }
    #[inline(always)]
    fn round(self, a: V) -> V {
        a.map(f32::round_ties_even)
    }
    #[inline(always)]
    fn select_lt(self, a: V, b: V, x: V, y: V) -> V {
        std::array::from_fn(|i| if a[i] < b[i] { x[i] } else { y[i] })
    }
    #[inline(always)]
    fn times_power(self, p: V, t: V) -> V {
        std::array::from_fn(|i| f32::from_bits(p[i].to_bits().wrapping_add(t[i].to_bits() << 23)))
    }
    #[inline(always)]
    fn reciprocal_guess(self, x: V) -> V {
        x.map(|x| f32::from_bits(RECIPROCAL.wrapping_sub(x.to_bits())))
    }
    #[inline(always)]
    fn sum(self, a: V) -> f32 {
        let b: [f32; 8] = std::array::from_fn(|i| a[i] + a[i + 8]);
        let c: [f32; 4] = std::array::from_fn(|i| b[i] + b[i + 4]);
        (c[0] + c[2]) + (c[1] + c[3])
    }
    #[inline(always)]
    fn max_lane(self, a: V) -> f32 {
        a.into_iter().fold(f32::NEG_INFINITY, |m, x| if x > m { x } else { m })
    }

    #[inline(always)]
    fn bytes_of(self, x: u8) -> [u64; 8] {
        [u64::from_le_bytes([x; 8]); 8]
    }
    #[inline(always)]
    fn load_halves(self, low: &[u8; 32], high: &[u8; 32]) -> [u64; 8] {
        let (low, high) = (low.as_chunks::<8>().0, high.as_chunks::<8>().0);
        std::array::from_fn(|i| u64::from_le_bytes(if i < 4 { low[i] } else { high[i - 4] }))
    }
    #[inline(always)]
    fn load_quarters(self, low: &[u8; 16], high: &[u8; 16]) -> [u64; 8] {
        let (low, high) = (low.as_chunks::<8>().0, high.as_chunks::<8>().0);
        std::array::from_fn(|i| u64::from_le_bytes(if i < 4 { low[i % 2] } else { high[i % 2] }))
    }
    #[inline(always)]
    fn store_bytes(self, x: [u64; 8], out: &mut [u8; 64]) {
        for (out, x) in out.as_chunks_mut::<8>().0.iter_mut().zip(x) {
            *out = x.to_le_bytes();
        }
    }
    #[inline(always)]
    fn sub_bytes(self, a: [u64; 8], b: [u64; 8]) -> [u64; 8] {
        std::array::from_fn(|i| {
            let (a, b) = (a[i].to_le_bytes(), b[i].to_le_bytes());
            u64::from_le_bytes(std::array::from_fn(|i| a[i].wrapping_sub(b[i])))
        })
    }
    #[inline(always)]
    fn and_bytes(self, a: [u64; 8], b: [u64; 8]) -> [u64; 8] {
        std::array::from_fn(|i| a[i] & b[i])
    }
    #[inline(always)]
    fn or_bytes(self, a: [u64; 8], b: [u64; 8]) -> [u64; 8] {
        std::array::from_fn(|i| a[i] | b[i])
    }
    #[inline(always)]
    fn xor_bytes(self, a: [u64; 8], b: [u64; 8]) -> [u64; 8] {
        std::array::from_fn(|i| a[i] ^ b[i])
    }
    #[inline(always)]
    fn shift_quarters(self, x: [u64; 8], by: [u32; 4]) -> [u64; 8] {
        std::array::from_fn(|i| x[i] >> by[i / 2])
    }
    #[inline(always)]
    fn shift_left(self, x: [u64; 8], by: u32) -> [u64; 8] {
        x.map(|x| x << by)
    }
    #[inline(always)]
    fn bytes_where(self, bits: u64, x: u8) -> [u64; 8] {
        bits.to_le_bytes().map(|bits| {
            // bit i in byte i, whatever stands there made 1, then x
            let spread = (0x0101_0101_0101_0101 * u64::from(bits)) & 0x8040_2010_0804_0201;
            ((spread + 0x7f7f_7f7f_7f7f_7f7f) >> 7 & 0x0101_0101_0101_0101) * u64::from(x)
        })
    }
    #[inline(always)]
    fn lookup(self, table: &[u8; 16], x: [u64; 8]) -> [u64; 8] {
        x.map(|x| u64::from_le_bytes(x.to_le_bytes().map(|x| table[usize::from(x & 15)])))
    }
}
