//! Four 128-bit NEON registers as sixteen lanes.

use std::arch::aarch64::*;
use std::arch::asm;

use minke_num::bf16;

use crate::gemm::tile::Tile;

use super::bytes_neon::{self, B};
use super::{Kernel, LANES, RECIPROCAL, Simd};
use crate::stored::panels::{Panel, PanelTile};
use crate::stored::tile::BytesTile;

/// The witness, and whether it answers for products of bytes (`sdot`): made by [`run`] and [`run_dot`] alone.
#[derive(Clone, Copy)]
pub struct Neon<const SDOT: bool>(());

/// Runs a kernel with NEON.
///
/// # Safety
/// The machine must have `neon`.
#[target_feature(enable = "neon")]
pub unsafe fn run<K: Kernel>(kernel: K) -> K::Out {
    kernel.run(Neon::<false>(()))
}

/// Runs a kernel with NEON and its products of bytes.
///
/// # Safety
/// The machine must have `neon` and `dotprod`.
#[target_feature(enable = "neon,dotprod")]
pub unsafe fn run_dot<K: Kernel>(kernel: K) -> K::Out {
    kernel.run(Neon::<true>(()))
}

/// Sixteen lanes.
pub type V = [float32x4_t; 4];

macro_rules! per_quarter {
    (|$i:ident| $e:expr) => {{
        // SAFETY: the witness says that NEON exists; references are readable or writable.
        unsafe {
            let f = |$i: usize| $e;
            [f(0), f(1), f(2), f(3)]
        }
    }};
}

/// The register tile of this level.
#[target_feature(enable = "neon")]
unsafe fn product_tile(tile: Tile, rows: usize, vecs: usize) {
    // SAFETY: by the promise of the caller of `tile`.
    unsafe { crate::gemm::tile::body(Neon::<false>(()), tile, rows, vecs) }
}

impl<const SDOT: bool> Simd for Neon<SDOT> {
    type V = V;
    type B = B;
    const TILE_ROWS: usize = 6;
    const TILE_VECS: usize = 1;

    #[inline(always)]
    unsafe fn tile(self, tile: Tile, rows: usize, vecs: usize) {
        // SAFETY: the witness says that the instructions exist; the rest is the caller's promise.
        unsafe { product_tile(tile, rows, vecs) }
    }

    #[inline(always)]
    fn prefetch<T>(self, at: *const T) {
        prefetch(at);
    }
    #[inline(always)]
    fn splat(self, x: f32) -> V {
        per_quarter!(|_i| vdupq_n_f32(x))
    }
    #[inline(always)]
    fn load(self, x: &[f32; LANES]) -> V {
        per_quarter!(|i| vld1q_f32(x.as_ptr().add(4 * i)))
    }
    #[inline(always)]
    fn store(self, x: V, out: &mut [f32; LANES]) {
        for (i, x) in x.into_iter().enumerate() {
            // SAFETY: sixteen floats are writable.
            unsafe { vst1q_f32(out.as_mut_ptr().add(4 * i), x) }
        }
    }
    #[inline(always)]
    fn load_i8(self, x: &[i8; LANES]) -> V {
        // SAFETY: the witness says that NEON exists; sixteen bytes are readable.
        unsafe {
            let x = vld1q_s8(x.as_ptr());
            let (low, high) = (vmovl_s8(vget_low_s8(x)), vmovl_high_s8(x));
            [
                vmovl_s16(vget_low_s16(low)),
                vmovl_high_s16(low),
                vmovl_s16(vget_low_s16(high)),
                vmovl_high_s16(high),
            ]
            .map(|x| vcvtq_f32_s32(x))
        }
    }
    #[inline(always)]
    fn load_bf16(self, x: &[bf16; LANES]) -> V {
        per_quarter!(|i| vreinterpretq_f32_u32(vshll_n_u16::<16>(vld1_u16(x.as_ptr().add(4 * i).cast()))))
    }
    #[inline(always)]
    fn store_bf16(self, x: V, out: &mut [bf16; LANES]) {
        for (i, x) in x.into_iter().enumerate() {
            // SAFETY: sixteen halves are writable.
            unsafe {
                let bits = vreinterpretq_u32_f32(x);
                let odd = vandq_u32(vshrq_n_u32::<16>(bits), vdupq_n_u32(1));
                let rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
                let quiet = vorrq_u32(bits, vdupq_n_u32(0x0040_0000));
                let word = vbslq_u32(vceqq_f32(x, x), rounded, quiet);
                vst1_u16(out.as_mut_ptr().add(4 * i).cast(), vshrn_n_u32::<16>(word));
            }
        }
    }
    #[inline(always)]
    fn add(self, a: V, b: V) -> V {
        per_quarter!(|i| vaddq_f32(a[i], b[i]))
    }
    #[inline(always)]
    fn sub(self, a: V, b: V) -> V {
        per_quarter!(|i| vsubq_f32(a[i], b[i]))
    }
    #[inline(always)]
    fn mul(self, a: V, b: V) -> V {
        per_quarter!(|i| vmulq_f32(a[i], b[i]))
    }
    #[inline(always)]
    fn div(self, a: V, b: V) -> V {
        per_quarter!(|i| vdivq_f32(a[i], b[i]))
    }
    #[inline(always)]
    fn fma(self, a: V, b: V, c: V) -> V {
        per_quarter!(|i| vfmaq_f32(c[i], a[i], b[i]))
    }
    #[inline(always)]
    fn max(self, a: V, b: V) -> V {
        // not vmaxq: NaN must behave as on x86
        per_quarter!(|i| vbslq_f32(vcgtq_f32(a[i], b[i]), a[i], b[i]))
    }
    #[inline(always)]
    fn min(self, a: V, b: V) -> V {
        per_quarter!(|i| vbslq_f32(vcltq_f32(a[i], b[i]), a[i], b[i]))
    }
    #[inline(always)]
    fn sqrt(self, a: V) -> V {
        per_quarter!(|i| vsqrtq_f32(a[i]))
    }
    #[inline(always)]
    fn round(self, a: V) -> V {
        per_quarter!(|i| vrndnq_f32(a[i]))
    }
    #[inline(always)]
    fn select_lt(self, a: V, b: V, x: V, y: V) -> V {
        per_quarter!(|i| vbslq_f32(vcltq_f32(a[i], b[i]), x[i], y[i]))
    }
    #[inline(always)]
    fn times_power(self, p: V, t: V) -> V {
        per_quarter!(|i| {
            let power = vshlq_n_u32::<23>(vreinterpretq_u32_f32(t[i]));
            vreinterpretq_f32_u32(vaddq_u32(vreinterpretq_u32_f32(p[i]), power))
        })
    }
    #[inline(always)]
    fn reciprocal_guess(self, x: V) -> V {
        per_quarter!(|i| {
            vreinterpretq_f32_u32(vsubq_u32(vdupq_n_u32(RECIPROCAL), vreinterpretq_u32_f32(x[i])))
        })
    }
    #[inline(always)]
    fn sum(self, a: V) -> f32 {
        // SAFETY: the witness says that NEON exists.
        unsafe {
            let quad = vaddq_f32(vaddq_f32(a[0], a[2]), vaddq_f32(a[1], a[3]));
            let pair = vadd_f32(vget_low_f32(quad), vget_high_f32(quad));
            vget_lane_f32::<0>(pair) + vget_lane_f32::<1>(pair)
        }
    }
    #[inline(always)]
    fn max_lane(self, a: V) -> f32 {
        let mut lanes = [0.0; LANES];
        self.store(a, &mut lanes);
        lanes.into_iter().fold(f32::NEG_INFINITY, |m, x| if x > m { x } else { m })
    }

    #[inline(always)]
    fn max_size(self, most: V, x: V) -> V {
        per_quarter!(|i| {
            let size = vreinterpretq_u32_f32(vabsq_f32(x[i]));
            vreinterpretq_f32_u32(vmaxq_u32(vreinterpretq_u32_f32(most[i]), size))
        })
    }
    #[inline(always)]
    fn max_size_lane(self, most: V) -> f32 {
        // SAFETY: the witness says that NEON exists.
        unsafe {
            let mut largest = vreinterpretq_u32_f32(most[0]);
            for most in &most[1..] {
                largest = vmaxq_u32(largest, vreinterpretq_u32_f32(*most));
            }
            f32::from_bits(vmaxvq_u32(largest))
        }
    }
    #[inline(always)]
    fn portion<const OF: usize>(self, x: V, i: usize) -> V {
        const { assert!(OF == 1 || OF == 2 || OF == 4, "whole vectors") };
        let mut part = self.zero();
        part[..4 / OF].copy_from_slice(&x[i * (4 / OF)..][..4 / OF]);
        part
    }
    #[inline(always)]
    fn transpose(self, rows: [V; LANES]) -> [V; LANES] {
        let mut out = rows;
        for high in 0..4 {
            for wide in 0..4 {
                let four = &rows[4 * high..];
                let from = [four[0][wide], four[1][wide], four[2][wide], four[3][wide]];
                // SAFETY: the witness says that NEON exists.
                let turned = unsafe { turn(from) };
                for (i, turned) in turned.into_iter().enumerate() {
                    out[4 * wide + i][high] = turned;
                }
            }
        }
        out
    }

    #[inline(always)]
    fn bytes_of(self, x: u8) -> B {
        // SAFETY (here and below): the witness says that NEON exists; references are readable or writable.
        unsafe { [vdupq_n_u8(x); 4] }
    }
    #[inline(always)]
    fn load_halves(self, low: &[u8; 32], high: &[u8; 32]) -> B {
        unsafe {
            let (low, high) = (low.as_ptr(), high.as_ptr());
            [vld1q_u8(low), vld1q_u8(low.add(16)), vld1q_u8(high), vld1q_u8(high.add(16))]
        }
    }
    #[inline(always)]
    fn load_quarters(self, low: &[u8; 16], high: &[u8; 16]) -> B {
        unsafe {
            let (low, high) = (vld1q_u8(low.as_ptr()), vld1q_u8(high.as_ptr()));
            [low, low, high, high]
        }
    }
    #[inline(always)]
    fn store_bytes(self, x: B, out: &mut [u8; 64]) {
        for (i, x) in x.into_iter().enumerate() {
            unsafe { vst1q_u8(out.as_mut_ptr().add(16 * i), x) }
        }
    }
    #[inline(always)]
    fn store_half<const HIGH: bool>(self, x: B, out: &mut [u8; 32]) {
        let first = if HIGH { 2 } else { 0 };
        unsafe {
            vst1q_u8(out.as_mut_ptr(), x[first]);
            vst1q_u8(out.as_mut_ptr().add(16), x[first + 1]);
        }
    }
    #[inline(always)]
    fn sub_bytes(self, a: B, b: B) -> B {
        per_quarter!(|i| vsubq_u8(a[i], b[i]))
    }
    #[inline(always)]
    fn and_bytes(self, a: B, b: B) -> B {
        per_quarter!(|i| vandq_u8(a[i], b[i]))
    }
    #[inline(always)]
    fn or_bytes(self, a: B, b: B) -> B {
        per_quarter!(|i| vorrq_u8(a[i], b[i]))
    }
    #[inline(always)]
    fn xor_bytes(self, a: B, b: B) -> B {
        per_quarter!(|i| veorq_u8(a[i], b[i]))
    }
    #[inline(always)]
    fn shift_quarters(self, x: B, by: [u32; 4]) -> B {
        per_quarter!(|i| shifted(x[i], -i64::from(by[i])))
    }
    #[inline(always)]
    fn shift_left(self, x: B, by: u32) -> B {
        per_quarter!(|i| shifted(x[i], i64::from(by)))
    }
    #[inline(always)]
    fn bytes_where(self, bits: u64, x: u8) -> B {
        per_quarter!(|i| {
            // byte i sees the eight bits among which its own is
            let order = vcombine_u8(vdup_n_u8(2 * i as u8), vdup_n_u8(2 * i as u8 + 1));
            let own = vreinterpretq_u8_u64(vdupq_n_u64(0x8040_2010_0804_0201));
            let bits = vqtbl1q_u8(vreinterpretq_u8_u64(vdupq_n_u64(bits)), order);
            vandq_u8(vtstq_u8(bits, own), vdupq_n_u8(x))
        })
    }
    #[inline(always)]
    fn lookup(self, table: &[u8; 16], x: B) -> B {
        per_quarter!(|i| vqtbl1q_u8(vld1q_u8(table.as_ptr()), x[i]))
    }

    #[inline(always)]
    fn load_u8(self, x: [u64; 2]) -> V {
        unsafe {
            let x = vcombine_u8(vcreate_u8(x[0]), vcreate_u8(x[1]));
            let (low, high) = (vmovl_u8(vget_low_u8(x)), vmovl_high_u8(x));
            [
                vcvtq_f32_u32(vmovl_u16(vget_low_u16(low))),
                vcvtq_f32_u32(vmovl_high_u16(low)),
                vcvtq_f32_u32(vmovl_u16(vget_low_u16(high))),
                vcvtq_f32_u32(vmovl_high_u16(high)),
            ]
        }
    }
    #[inline(always)]
    fn halves(self, low: f32, high: f32) -> V {
        unsafe {
            let (low, high) = (vdupq_n_f32(low), vdupq_n_f32(high));
            [low, low, high, high]
        }
    }
    #[inline(always)]
    fn store_i8(self, x: V, out: &mut [i8; LANES]) -> i32 {
        unsafe {
            let half = |a, b| {
                let (a, b) = (vcvtnq_s32_f32(a), vcvtnq_s32_f32(b));
                vqmovn_s16(vcombine_s16(vqmovn_s32(a), vqmovn_s32(b)))
            };
            let bytes = vcombine_s8(half(x[0], x[1]), half(x[2], x[3]));
            vst1q_s8(out.as_mut_ptr(), bytes);
            i32::from(vaddlvq_s8(bytes))
        }
    }
    #[inline(always)]
    fn store_e4m3(self, x: V, out: &mut [u8; LANES]) {
        unsafe {
            let low = vcombine_u16(vmovn_u32(e4m3_code(x[0])), vmovn_u32(e4m3_code(x[1])));
            let high = vcombine_u16(vmovn_u32(e4m3_code(x[2])), vmovn_u32(e4m3_code(x[3])));
            vst1q_u8(out.as_mut_ptr(), vcombine_u8(vmovn_u16(low), vmovn_u16(high)));
        }
    }
    #[inline(always)]
    fn load_e4m3(self, codes: &[u8; LANES]) -> V {
        unsafe {
            let codes = vld1q_u8(codes.as_ptr());
            let (low, high) = (vmovl_u8(vget_low_u8(codes)), vmovl_high_u8(codes));
            [
                e4m3_value(vmovl_u16(vget_low_u16(low))),
                e4m3_value(vmovl_high_u16(low)),
                e4m3_value(vmovl_u16(vget_low_u16(high))),
                e4m3_value(vmovl_high_u16(high)),
            ]
        }
    }
    #[inline(always)]
    fn round_e4m3(self, x: V) -> V {
        per_quarter!(|i| {
            // a zero loses its sign, which no sum sees
            let places = vreinterpretq_f32_u32(e4m3_places(x[i]).0);
            vsubq_f32(vaddq_f32(x[i], places), places)
        })
    }

    #[inline(always)]
    fn load_f16(self, x: [u64; 4]) -> V {
        per_quarter!(|i| widened(vcreate_u16(x[i])))
    }

    /// Not measured on any machine, but counted: where `sdot` makes tiles cheap, they pay sooner.
    const FEW_ROWS: usize = if SDOT { 8 } else { 12 };

    #[inline(always)]
    fn signed_bytes(offset: u8) -> bool {
        if SDOT { offset != 0 } else { offset == 128 }
    }
    #[inline(always)]
    fn block_dots(self, q: [B; 8], x: &[i8], offset: u8, sums: V) -> V {
        // SAFETY: the witness says that the instructions exist.
        unsafe { bytes_neon::block_dots::<SDOT>(q, x, offset, sums) }
    }
    #[inline(always)]
    unsafe fn bytes_tile(self, tile: BytesTile) {
        // SAFETY: by the caller's promise; the witness says that the instructions exist.
        unsafe { if SDOT { bytes_neon::tile_sdot(tile) } else { bytes_neon::tile(tile) } }
    }

    const PANELS: bool = SDOT;

    #[inline(always)]
    unsafe fn panel_tile<F: Panel, const M: usize>(self, tile: PanelTile) {
        // SAFETY: by the caller's promise; the witness says that the instructions exist.
        unsafe { bytes_neon::panel_tile::<F, M>(tile) }
    }
}

/// Asks memory for the line of an address, any address.
#[inline(always)]
pub fn prefetch<T>(at: *const T) {
    // SAFETY: a hint reads nothing.
    unsafe {
        asm!("prfm pldl2keep, [{at}]", at = in(reg) at, options(readonly, nostack, preserves_flags));
    }
}

/// The number whose last place is that of E4M3 at the size of each lane, 1.5 times the power of two that is 2^20 of x's or
/// of 2^-6: added and taken away again, it rounds. Beside it, how far x's exponent is above that of 2^-6.
#[inline(always)]
unsafe fn e4m3_places(x: float32x4_t) -> (uint32x4_t, uint32x4_t) {
    // SAFETY: the witness of the caller says that NEON exists.
    unsafe {
        let exponent = vandq_u32(vreinterpretq_u32_f32(x), vdupq_n_u32(0x7f80_0000));
        let exponent = vqsubq_u32(exponent, vdupq_n_u32(121 << 23));
        (vaddq_u32(exponent, vdupq_n_u32((121 + 20) << 23 | 1 << 22)), exponent)
    }
}

/// Codes of four values of magnitude up to 448.
#[inline(always)]
unsafe fn e4m3_code(x: float32x4_t) -> uint32x4_t {
    // SAFETY: the witness of the caller says that NEON exists.
    unsafe {
        let (places, exponent) = e4m3_places(x);
        // places are counted from the middle of the magic number, and those of an exponent go on where its codes begin
        let rounded = vreinterpretq_s32_f32(vaddq_f32(x, vreinterpretq_f32_u32(places)));
        let size = vabdq_s32(rounded, vreinterpretq_s32_u32(places));
        let size = vaddq_u32(vreinterpretq_u32_s32(size), vshrq_n_u32::<20>(exponent));
        let sign = vandq_u32(vshrq_n_u32::<24>(vreinterpretq_u32_f32(x)), vdupq_n_u32(0x80));
        vorrq_u32(size, sign)
    }
}

/// The values of four codes.
#[inline(always)]
unsafe fn e4m3_value(codes: uint32x4_t) -> float32x4_t {
    // SAFETY: the witness of the caller says that NEON exists.
    unsafe {
        let size = vreinterpretq_f32_u32(vshlq_n_u32::<20>(vandq_u32(codes, vdupq_n_u32(0x7f))));
        // mends the bias, and makes subnormals normal
        let size = vmulq_f32(size, vdupq_n_f32(f32::from_bits(0x7b80_0000)));
        let sign = vshlq_n_u32::<24>(vandq_u32(codes, vdupq_n_u32(0x80)));
        vreinterpretq_f32_u32(vorrq_u32(vreinterpretq_u32_f32(size), sign))
    }
}

/// Numbers of eight bytes shifted left, or right by less than nothing.
#[inline(always)]
unsafe fn shifted(x: uint8x16_t, by: i64) -> uint8x16_t {
    // SAFETY: by the caller's promise that NEON exists.
    unsafe { vreinterpretq_u8_u64(vshlq_u64(vreinterpretq_u64_u8(x), vdupq_n_s64(by))) }
}

/// Four f16, exactly. (The compiler's own is not stable everywhere yet.)
#[inline(always)]
pub unsafe fn widened(x: uint16x4_t) -> float32x4_t {
    let out: float32x4_t;
    // SAFETY: by the caller's promise that NEON exists; nothing but the operands is touched.
    unsafe {
        asm!(
            "fcvtl {out:v}.4s, {x:v}.4h",
            out = lateout(vreg) out,
            x = in(vreg) x,
            options(pure, nomem, nostack),
        );
    }
    out
}

/// Four rows of four turned over.
#[inline(always)]
unsafe fn turn(x: [float32x4_t; 4]) -> [float32x4_t; 4] {
    // SAFETY: by the caller's promise that NEON exists.
    unsafe {
        let (a, b) = (vtrn1q_f32(x[0], x[1]), vtrn2q_f32(x[0], x[1]));
        let (c, d) = (vtrn1q_f32(x[2], x[3]), vtrn2q_f32(x[2], x[3]));
        let low =
            |x, y| vreinterpretq_f32_f64(vzip1q_f64(vreinterpretq_f64_f32(x), vreinterpretq_f64_f32(y)));
        let high =
            |x, y| vreinterpretq_f32_f64(vzip2q_f64(vreinterpretq_f64_f32(x), vreinterpretq_f64_f32(y)));
        [low(a, c), low(b, d), high(a, c), high(b, d)]
    }
}
