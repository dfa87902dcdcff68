//! Every level against the scalar twin, bit for bit, on awkward inputs.

use minke_num::{bf16, rng};

use super::*;

/// Applies every operation to two vectors and collects all result bits.
struct Everything<'a>(&'a [f32; LANES], &'a [f32; LANES]);

impl Kernel for Everything<'_> {
    type Out = Vec<u32>;
    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Vec<u32> {
        let (a, b) = (s.load(self.0), s.load(self.1));
        let whole = s.max(s.min(s.round(a), s.splat(127.0)), s.splat(-126.0));
        let vectors = [
            s.add(a, b),
            s.sub(a, b),
            s.mul(a, b),
            s.div(a, b),
            s.fma(a, b, a),
            s.max(a, b),
            s.min(a, b),
            s.sqrt(s.mul(a, a)),
            s.round(a),
            s.select_lt(a, b, a, b),
            s.times_power(s.splat(1.5), s.add(whole, s.splat(WHOLE))),
            s.reciprocal_guess(s.add(s.splat(1.0), s.mul(a, a))),
            s.round_bf16(a),
            s.exp(a),
            s.sigmoid(b),
            s.tanh(a),
            s.load_part(&self.0[..5], 7.0),
        ];
        let mut bits = Vec::new();
        for v in vectors {
            let mut out = [0.0; LANES];
            s.store(v, &mut out);
            // which NaN it is differs between instruction sets, and may
            bits.extend(out.map(|x| if x.is_nan() { f32::NAN.to_bits() } else { x.to_bits() }));
        }
        let most = s.max_size(s.max_size(s.zero(), a), b);
        let mut out = [0.0; LANES];
        s.store(most, &mut out);
        bits.extend(out.map(|x| if x.is_nan() { f32::NAN.to_bits() } else { x.to_bits() }));
        let largest = s.max_size_lane(most);
        bits.push(if largest.is_nan() { f32::NAN.to_bits() } else { largest.to_bits() });
        let small = self.0.map(|x| if x.abs() <= fp8::E4M3_MAX { x } else { 1.0 / 3.0 });
        let mut codes = [0; LANES];
        s.store_e4m3(s.load(&small), &mut codes);
        bits.extend(codes.map(u32::from));
        let (mut back, mut rounded) = ([0.0; LANES], [0.0; LANES]);
        s.store(s.load_e4m3(&codes), &mut back);
        s.store(s.round_e4m3(s.load(&small)), &mut rounded);
        // the sign of a zero apart
        bits.extend(back.map(|x| (x + 0.0).to_bits()));
        bits.extend(rounded.map(|x| (x + 0.0).to_bits()));
        s.store(s.load_i8(&self.0.map(|x| x as i8)), &mut back);
        bits.extend(back.map(f32::to_bits));
        let mut half = [bf16::ZERO; LANES];
        s.store_bf16(a, &mut half);
        bits.extend(half.map(|x| if x.is_nan() { 0x7fc0 } else { u32::from(x.to_bits()) }));
        let mut part = [9.0; 7];
        s.store_part(b, &mut part[..3]);
        bits.extend(part.map(f32::to_bits));
        let rows = std::array::from_fn(|i| s.fma(a, s.splat(i as f32), b));
        for row in s.transpose(rows) {
            let mut out = [0.0; LANES];
            s.store(row, &mut out);
            bits.extend(out.map(|x| if x.is_nan() { f32::NAN.to_bits() } else { x.to_bits() }));
        }
        if self.0.iter().all(|x| x.is_finite()) {
            bits.push(s.sum(a).to_bits());
            bits.push(s.max_lane(a).to_bits());
        }
        bits
    }
}

#[test]
fn levels_agree_with_scalar() {
    let special =
        [0.0, -0.0, 1.0, f32::MIN_POSITIVE, 1e-40, 3e38, -3e38, 88.0, -88.0, -87.31, 0.5, 1.5, 2.5, -2.5];
    for case in 0..200u64 {
        let mut a: [f32; LANES] = std::array::from_fn(|i| (rng::uniform(1, case, i as u64) - 0.5) * 200.0);
        let mut b: [f32; LANES] = std::array::from_fn(|i| (rng::uniform(2, case, i as u64) - 0.5) * 3.0);
        if case % 3 == 0 {
            a = std::array::from_fn(|i| special[(i + case as usize) % special.len()]);
        }
        if case % 7 == 0 {
            a[3] = f32::INFINITY;
            b[5] = f32::NEG_INFINITY;
        }
        let expected = Level::SCALAR.dispatch(Everything(&a, &b));
        for level in Level::available() {
            assert_eq!(level.dispatch(Everything(&a, &b)), expected, "{} case {case}", level.name());
        }
    }
}

struct Exp<'a>(&'a [f32; LANES], &'a mut [f32; LANES]);
impl Kernel for Exp<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let y = s.exp(s.load(self.0));
        s.store(y, self.1);
    }
}

#[test]
fn exp_is_accurate() {
    let mut worst = 0.0f64;
    for i in 0..20_000 {
        let x: [f32; LANES] = std::array::from_fn(|j| -87.0 + (i * LANES + j) as f32 * (175.0 / 320_000.0));
        let mut y = [0.0; LANES];
        Level::detect().dispatch(Exp(&x, &mut y));
        for (x, y) in x.into_iter().zip(y) {
            let e = f64::from(x).exp();
            worst = worst.max((f64::from(y) - e).abs() / e);
        }
    }
    assert!(worst < 3e-7, "worst relative error {worst:e}");
    let mut y = [1.0; LANES];
    Level::detect().dispatch(Exp(&[f32::NEG_INFINITY; LANES], &mut y));
    assert_eq!(y, [0.0; LANES]);
    Level::detect().dispatch(Exp(&[0.0; LANES], &mut y));
    assert_eq!(y, [1.0; LANES]);
    for bits in [0x7fc0_0000, 0xffc0_0000, 0x7f80_0001, 0x7fff_ffff] {
        Level::detect().dispatch(Exp(&[f32::from_bits(bits); LANES], &mut y));
        assert!(y.iter().all(|y| y.is_nan()), "{bits:x}");
    }
}

struct Sigmoid<'a>(&'a [f32; LANES], &'a mut [f32; LANES]);
impl Kernel for Sigmoid<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let y = s.sigmoid(s.load(self.0));
        s.store(y, self.1);
    }
}

#[test]
fn sigmoid_is_accurate() {
    let mut worst = 0.0f64;
    for i in 0..20_000 {
        let x: [f32; LANES] = std::array::from_fn(|j| -86.0 + (i * LANES + j) as f32 * (172.0 / 320_000.0));
        let mut y = [0.0; LANES];
        Level::detect().dispatch(Sigmoid(&x, &mut y));
        for (x, y) in x.into_iter().zip(y) {
            let exact = 1.0 / (1.0 + (-f64::from(x)).exp());
            worst = worst.max((f64::from(y) - exact).abs() / exact);
        }
    }
    assert!(worst < 4e-7, "worst relative error {worst:e}");
    let mut y = [1.0; LANES];
    for (x, least, most) in [(f32::NEG_INFINITY, 0.0, 2e-38), (f32::INFINITY, 1.0, 1.0), (-1e30, 0.0, 2e-38)]
    {
        Level::detect().dispatch(Sigmoid(&[x; LANES], &mut y));
        assert!(y.iter().all(|y| (least..=most).contains(y)), "sigmoid({x}) = {}", y[0]);
    }
    Level::detect().dispatch(Sigmoid(&[f32::from_bits(0x7f80_0001); LANES], &mut y));
    assert!(y.iter().all(|y| y.is_nan()));
}

struct Tanh<'a>(&'a [f32; LANES], &'a mut [f32; LANES]);
impl Kernel for Tanh<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let y = s.tanh(s.load(self.0));
        s.store(y, self.1);
    }
}

#[test]
fn tanh_is_accurate() {
    let mut worst = 0.0f64;
    for i in 0..20_000 {
        let x: [f32; LANES] =
            std::array::from_fn(|j| -12.0 + (i * LANES + j) as f32 * (24.0 / 320_000.0) + 1e-7);
        let mut y = [0.0; LANES];
        Level::detect().dispatch(Tanh(&x, &mut y));
        for (x, y) in x.into_iter().zip(y) {
            let exact = f64::from(x).tanh();
            worst = worst.max((f64::from(y) - exact).abs() / exact.abs());
        }
    }
    assert!(worst < 2e-6, "worst relative error {worst:e}");
    let mut y = [1.0; LANES];
    for (x, expected) in [(f32::INFINITY, 1.0), (f32::NEG_INFINITY, -1.0), (0.0, 0.0), (1e-30, 1e-30)] {
        Level::detect().dispatch(Tanh(&[x; LANES], &mut y));
        assert_eq!(y, [expected; LANES], "tanh({x})");
    }
    Level::detect().dispatch(Tanh(&[f32::NAN; LANES], &mut y));
    assert!(y.iter().all(|y| y.is_nan()));
}

/// What the levels of an architecture are, so that a run of the tests says which of them it could not force.
#[test]
fn levels_that_this_machine_lacks_are_said() {
    let known: &[&str] = if cfg!(target_arch = "x86_64") {
        &["scalar", "avx2", "avx2-vnni", "avx512", "avx512-vnni", "avx512-bf16", "amx-bf16"]
    } else if cfg!(target_arch = "aarch64") {
        &["scalar", "neon", "neon-dot"]
    } else {
        &["scalar"]
    };
    let tested: Vec<_> = Level::available().into_iter().map(Level::name).collect();
    assert!(tested.iter().all(|name| known.contains(name)), "{tested:?} of {known:?}");
    let skipped: Vec<_> = known.iter().filter(|name| !tested.contains(name)).copied().collect();
    let (tested, none) = (tested.join(", "), if skipped.is_empty() { "none" } else { "" });
    let line = format!(
        "\ninstruction sets: tested {tested}; skipped, because this machine lacks them: {none}{}\n",
        skipped.join(", ")
    );
    // not by a macro: those are captured
    std::io::Write::write_all(&mut std::io::stderr(), line.as_bytes()).unwrap();
}

/// All f16, one by one, by halves and as vectors.
struct Halves;

impl Kernel for Halves {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let number = |bits: u16| minke_num::f16::from_bits(bits).to_f32();
        for bits in 0..=u16::MAX {
            let other = bits.wrapping_mul(7) ^ 0x5a5a;
            let words = [bits, other, bits ^ 1, !other].map(|x| u64::from(x) * 0x0001_0001_0001_0001);
            let vectors = [
                (s.splat_f16(bits.to_le_bytes()), [bits; 4]),
                (s.halves_f16(bits.to_le_bytes(), other.to_le_bytes()), [bits, bits, other, other]),
                (s.load_f16(words), [bits, other, bits ^ 1, !other]),
            ];
            for (v, quarters) in vectors {
                let mut out = [0.0f32; LANES];
                s.store(v, &mut out);
                for (i, x) in out.into_iter().enumerate() {
                    let exact = number(quarters[i / 4]);
                    let same = x.to_bits() == exact.to_bits() || x.is_nan() && exact.is_nan();
                    assert!(same, "{:#x}: {x} {exact}", quarters[i / 4]);
                }
            }
        }
    }
}

#[test]
fn numbers_in_f16_are_exact() {
    for level in Level::available() {
        level.dispatch(Halves);
    }
}
