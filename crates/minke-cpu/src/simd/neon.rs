//! Four 128-bit NEON registers as sixteen lanes.

use std::arch::aarch64::*;

use minke_num::bf16;

use crate::gemm::tile::Tile;

use super::{Kernel, LANES, RECIPROCAL, Simd};

/// The witness: made by [`run`] alone.
#[derive(Clone, Copy)]
pub struct Neon(());

/// Runs a kernel with NEON.
///
/// # Safety
/// The machine must have `neon`.
#[target_feature(enable = "neon")]
pub unsafe fn run<K: Kernel>(kernel: K) -> K::Out {
    kernel.run(Neon(()))
}

type V = [float32x4_t; 4];

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
    unsafe { crate::gemm::tile::body(Neon(()), tile, rows, vecs) }
}

impl Simd for Neon {
    type V = V;
    type B = [u64; 8];
    const TILE_ROWS: usize = 6;
    const TILE_VECS: usize = 1;

    #[inline(always)]
    unsafe fn tile(self, tile: Tile, rows: usize, vecs: usize) {
        // SAFETY: the witness says that the instructions exist; the rest is the caller's promise.
        unsafe { product_tile(tile, rows, vecs) }
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

    plain_bytes!();
}
