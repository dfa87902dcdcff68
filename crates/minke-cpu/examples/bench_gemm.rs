//! Rates of the three products at the shapes of a training step: `cargo run --release --example bench_gemm [threads]`.

use std::time::Instant;

use minke_cpu::gemm::{Compute, Operand, Packed, matmul, matmul_tn};
use minke_cpu::{Cpu, View, ViewMut};
use minke_num::{bf16, rng};

fn main() {
    let threads = std::env::args().nth(1).and_then(|t| t.parse().ok()).unwrap_or(0);
    let cpu = Cpu::detect(threads);
    println!("{} threads, {}", cpu.threads(), cpu.level().name());
    let shapes = [
        (1024, 1024, 1024),
        (4096, 192, 288),
        (4096, 192, 80),
        (4096, 512, 192),
        (512, 4096, 192),
        (4096, 96, 192),
        (1, 4096, 192),
    ];
    for (m, n, k) in shapes {
        for compute in [Compute::F32, Compute::Bf16] {
            let (mut x, mut w, mut dy) = (vec![0.0f32; m * k], vec![0.0f32; n * k], vec![0.0f32; m * n]);
            rng::fill_normal(1, 1, 1.0, &mut x);
            rng::fill_normal(1, 2, 1.0, &mut w);
            rng::fill_normal(1, 3, 1.0, &mut dy);
            let half: Vec<bf16> = x.iter().map(|&x| bf16::from_f32(x)).collect();
            let d_half: Vec<bf16> = dy.iter().map(|&x| bf16::from_f32(x)).collect();
            let (xv, dv) = if compute == Compute::F32 {
                (View::F32(&x), View::F32(&dy))
            } else {
                (View::Bf16(&half), View::Bf16(&d_half))
            };
            let mut y32 = vec![0.0f32; m * n];
            let mut y16 = vec![bf16::ZERO; m * n];
            let mut dw = vec![0.0f32; n * k];
            let offsets = [0, m as u32];
            let mut b = Packed::empty();
            b.pack_nt(&cpu, View::F32(&w), 1, n, k, compute);
            let mut row = format!("{m:5} x {n:5} x {k:5} {compute:?}:");
            let flops = 2.0 * (m * n * k) as f64;
            for what in ["nt", "tn", "pack"] {
                let mut times: Vec<f64> = (0..15)
                    .map(|_| {
                        let reps = (4e7 / flops).ceil() as usize;
                        let start = Instant::now();
                        for _ in 0..reps {
                            match what {
                                "nt" => {
                                    let y = if compute == Compute::F32 {
                                        ViewMut::F32(&mut y32)
                                    } else {
                                        ViewMut::Bf16(&mut y16)
                                    };
                                    matmul(&cpu, Operand::new(xv, k), &offsets, &b, y, false);
                                }
                                "tn" => matmul_tn(
                                    &cpu,
                                    Operand::new(dv, n),
                                    Operand::new(xv, k),
                                    &offsets,
                                    compute,
                                    &mut dw,
                                    false,
                                ),
                                _ => b.pack_nt(&cpu, View::F32(&w), 1, n, k, compute),
                            }
                        }
                        start.elapsed().as_secs_f64() / reps as f64
                    })
                    .collect();
                times.sort_by(f64::total_cmp);
                let t = times[times.len() / 4];
                let figure = if what == "pack" {
                    format!("  pack {:.2} ms", t * 1e3)
                } else {
                    format!("  {what} {:.0} GFLOP/s", flops / t / 1e9)
                };
                row.push_str(&figure);
            }
            println!("{row}");
        }
    }
}
