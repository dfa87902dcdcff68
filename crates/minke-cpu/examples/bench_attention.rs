//! Speed of attention: useful causal FLOP/s beside what the register tile reaches alone, and decoding from a cache.
//!
//! `cargo run --release -p minke-cpu --example bench_attention -- [threads] [rounds] [shape]`
//!
//! Times are of the median run; shares are of the best runs, which a busy machine disturbs least.

use std::hint::black_box;
use std::time::Instant;

use minke_cpu::attention::{
    AttentionShape, CachedSegment, KvCache, Segment, backward, forward, forward_cached,
};
use minke_cpu::gemm::tile::{self, MAX_ROWS, PANEL, Tile};
use minke_cpu::simd::{Kernel, Simd};
use minke_cpu::{Cpu, DType, View, ViewMut};
use minke_num::{bf16, rng};

/// The register tile on operands that stay in the first-level cache.
struct Peak<'a> {
    a: &'a [f32],
    b: &'a [f32],
    c: &'a mut [f32],
    times: usize,
}

const PEAK_DEPTH: usize = 64;

impl Kernel for Peak<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for _ in 0..self.times {
            let t = Tile {
                depth: PEAK_DEPTH,
                a: self.a.as_ptr(),
                a_row: PEAK_DEPTH,
                a_step: 1,
                b: self.b.as_ptr(),
                c: self.c.as_mut_ptr(),
                c_row: PANEL,
                accumulate: false,
            };
            // SAFETY: the slices have 14 rows of the depth, the depth of a panel, and 14 rows of a panel.
            unsafe { tile::run(s, t, MAX_ROWS, 2) };
        }
    }
}

/// Seconds of the median run and of the best.
fn time(rounds: usize, mut f: impl FnMut()) -> (f64, f64) {
    f();
    let mut times: Vec<f64> = (0..rounds)
        .map(|_| {
            let start = Instant::now();
            f();
            start.elapsed().as_secs_f64()
        })
        .collect();
    times.sort_by(f64::total_cmp);
    (times[rounds / 2], times[0])
}

fn random(stream: u64, len: usize) -> Vec<f32> {
    let mut x = vec![0.0; len];
    rng::fill_normal(1, stream, 1.0, &mut x);
    x
}

fn half(x: &[f32]) -> Vec<bf16> {
    x.iter().map(|&x| bf16::from_f32(x)).collect()
}

struct Row {
    name: &'static str,
    sequences: usize,
    len: usize,
    heads: usize,
    kv_heads: usize,
    qk_dim: usize,
    v_dim: usize,
}

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let number =
        |i: usize, or: usize| args.get(i).map_or(or, |x| x.parse().expect("threads and rounds are numbers"));
    let (threads, rounds) = (number(0, 1), number(1, 21).max(1));
    let wanted = |x: &&Row| args.get(2).is_none_or(|name| name == x.name);
    let cpu = Cpu::detect(threads);
    let (a, b) = (random(0, MAX_ROWS * PEAK_DEPTH), random(1, PEAK_DEPTH * PANEL));
    let mut c = vec![0.0; MAX_ROWS * PANEL];
    let times = 1_000;
    let (_, seconds) = time(10 * rounds, || cpu.dispatch(Peak { a: &a, b: &b, c: black_box(&mut c), times }));
    let flops = 2.0 * (MAX_ROWS * PANEL * PEAK_DEPTH * times) as f64;
    let peak = flops / seconds / 1e9;
    println!(
        "level {}, {threads} threads; register tile alone, one thread: {peak:.0} GFLOP/s",
        cpu.level().name()
    );
    let peak = peak * threads as f64;

    let row = |name, sequences, len, heads, kv_heads, qk_dim, v_dim| Row {
        name,
        sequences,
        len,
        heads,
        kv_heads,
        qk_dim,
        v_dim,
    };
    let rows = [
        row("A", 16, 256, 6, 6, 48, 32),
        row("B", 8, 512, 8, 8, 48, 32),
        row("C", 8, 256, 6, 6, 48, 48),
        row("one", 1, 256, 2, 2, 48, 32),
        row("long", 1, 4096, 2, 2, 48, 32),
        row("grouped", 4, 512, 8, 2, 64, 64),
        row("large", 1, 1024, 4, 4, 192, 128),
    ];
    for x in rows.iter().filter(wanted) {
        for dtype in [DType::F32, DType::Bf16] {
            train(&cpu, x, dtype, rounds, peak);
        }
    }
    for x in rows.iter().filter(wanted) {
        for dtype in [DType::F32, DType::Bf16] {
            decode(&cpu, x, dtype, rounds);
        }
    }
}

fn shape(x: &Row) -> AttentionShape {
    let scale = 1.0 / (x.qk_dim as f32).sqrt();
    AttentionShape { heads: x.heads, kv_heads: x.kv_heads, qk_dim: x.qk_dim, v_dim: x.v_dim, scale }
}

fn train(cpu: &Cpu, x: &Row, dtype: DType, rounds: usize, peak: f64) {
    let shape = shape(x);
    let tokens = x.sequences * x.len;
    let segments: Vec<Segment> = (0..x.sequences).map(|i| Segment { start: i * x.len, len: x.len }).collect();
    let widths = [x.heads * x.qk_dim, x.kv_heads * x.qk_dim, x.kv_heads * x.v_dim, x.heads * x.v_dim];
    let [q, k, v, d_out] = [0, 1, 2, 3].map(|i| random(i as u64, tokens * widths[i]));
    let [hq, hk, hv, hd] = [half(&q), half(&k), half(&v), half(&d_out)];
    let [mut out, mut d_q, mut d_k, mut d_v] = [3, 0, 1, 2].map(|i| vec![0.0f32; tokens * widths[i]]);
    let [mut ho, mut hdq, mut hdk, mut hdv] = [3, 0, 1, 2].map(|i| vec![bf16::ZERO; tokens * widths[i]]);
    let mut lse = vec![0.0; tokens * x.heads];
    let ahead = time(rounds, || match dtype {
        DType::F32 => {
            let (q, k, v) = (View::F32(&q), View::F32(&k), View::F32(&v));
            forward(cpu, &shape, q, k, v, &segments, ViewMut::F32(&mut out), &mut lse);
        }
        DType::Bf16 => {
            let (q, k, v) = (View::Bf16(&hq), View::Bf16(&hk), View::Bf16(&hv));
            forward(cpu, &shape, q, k, v, &segments, ViewMut::Bf16(&mut ho), &mut lse);
        }
    });
    let back = time(rounds, || match dtype {
        DType::F32 => {
            let (q, k, v) = (View::F32(&q), View::F32(&k), View::F32(&v));
            let (out, d_out) = (View::F32(&out), View::F32(&d_out));
            let d = (ViewMut::F32(&mut d_q), ViewMut::F32(&mut d_k), ViewMut::F32(&mut d_v));
            backward(cpu, &shape, q, k, v, out, &lse, d_out, &segments, d.0, d.1, d.2);
        }
        DType::Bf16 => {
            let (q, k, v) = (View::Bf16(&hq), View::Bf16(&hk), View::Bf16(&hv));
            let (out, d_out) = (View::Bf16(&ho), View::Bf16(&hd));
            let d = (ViewMut::Bf16(&mut hdq), ViewMut::Bf16(&mut hdk), ViewMut::Bf16(&mut hdv));
            backward(cpu, &shape, q, k, v, out, &lse, d_out, &segments, d.0, d.1, d.2);
        }
    });
    // the first row of a sequence reads its own value and nothing else
    let close = |a: f32, b: f32| (a - b).abs() <= 1e-6 * b.abs();
    match dtype {
        DType::F32 => assert!(close(out[0], v[0]), "wrong result"),
        DType::Bf16 => assert!(ho[0] == hv[0], "wrong result"),
    }
    let pairs = (x.sequences * x.heads * x.len * (x.len + 1) / 2) as f64;
    let (f, b) =
        (pairs * 2.0 * (x.qk_dim + x.v_dim) as f64, pairs * 2.0 * (3 * x.qk_dim + 2 * x.v_dim) as f64);
    let (f, b) = (f / ahead.1 / 1e9, b / back.1 / 1e9);
    println!(
        "{:8} {:?} {}x{}, {} heads ({} kv), qk {}, v {}: forward {:.3} ms, best {f:.0} GFLOP/s ({:.0}%), backward {:.3} ms, best {b:.0} GFLOP/s ({:.0}%)",
        x.name,
        dtype,
        x.sequences,
        x.len,
        x.heads,
        x.kv_heads,
        x.qk_dim,
        x.v_dim,
        ahead.0 * 1e3,
        100.0 * f / peak,
        back.0 * 1e3,
        100.0 * b / peak,
    );
}

/// One new token for every sequence.
fn decode(cpu: &Cpu, x: &Row, dtype: DType, rounds: usize) {
    let shape = shape(x);
    let (k, v) = (random(1, x.len * x.kv_heads * x.qk_dim), random(2, x.len * x.kv_heads * x.v_dim));
    let q = random(0, x.sequences * x.heads * x.qk_dim);
    let mut out = vec![0.0; x.sequences * x.heads * x.v_dim];
    let caches: Vec<KvCache> = (0..x.sequences)
        .map(|_| {
            let mut cache = KvCache::new(&shape, dtype);
            cache.append(View::F32(&k), View::F32(&v));
            cache
        })
        .collect();
    let batch: Vec<CachedSegment> =
        caches.iter().enumerate().map(|(i, cache)| CachedSegment { start: i, len: 1, cache }).collect();
    let (seconds, best) = time(rounds, || {
        forward_cached(cpu, &shape, View::F32(&q), &batch, ViewMut::F32(&mut out));
    });
    let bytes: usize = caches.iter().map(KvCache::bytes).sum();
    println!(
        "{:8} {dtype:?} decode, {} sequences of {}: {:.3} ms, best {:.1} GB/s of cache",
        x.name,
        x.sequences,
        x.len,
        seconds * 1e3,
        bytes as f64 / best / 1e9
    );
}
