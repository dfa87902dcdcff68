//! Adam with decoupled weight decay, in one pass over weights, gradients and moments.

use crate::Cpu;
use crate::cpu::SharedMut;
use crate::rows::{self, SharedView, kernel, lanes, load, load_f32, store, store_f32};
use crate::view::ViewMut;

/// The settings of one step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamW {
    /// Learning rate.
    pub lr: f64,
    /// Decay of the mean of gradients.
    pub beta1: f64,
    /// Decay of the mean of their squares.
    pub beta2: f64,
    /// Added to the root of the latter.
    pub eps: f64,
    /// Share of a weight that a learning rate of 1 would take away.
    pub weight_decay: f64,
}

/// What the loop needs, prepared in f64 and rounded once.
#[derive(Clone, Copy)]
struct Scalars {
    grad: f32,
    keep: f32,
    mean: f32,
    beta2: f32,
    square: f32,
    root: f32,
    eps: f32,
    step: f32,
}

kernel! {
    Step<'a>(s: S, w: &'a mut [f32], g: &'a [f32], m: ViewMut<'a>, v: ViewMut<'a>, by: Scalars) {
        let (mut m, mut v) = (m, v);
        lanes!(w.len(), |i, n| {
            let grad = s.mul(load_f32(s, g, i, n), s.splat(by.grad));
            let mean = load(s, m.as_view(), i, n);
            let mean = s.fma(s.splat(by.mean), s.sub(grad, mean), mean);
            store(s, mean, &mut m, i, n);
            let square = s.mul(load(s, v.as_view(), i, n), s.splat(by.beta2));
            let square = s.fma(s.mul(grad, s.splat(by.square)), grad, square);
            store(s, square, &mut v, i, n);
            let root = s.add(s.div(s.sqrt(square), s.splat(by.root)), s.splat(by.eps));
            let kept = s.mul(load_f32(s, w, i, n), s.splat(by.keep));
            store_f32(s, s.sub(kept, s.div(s.mul(mean, s.splat(by.step)), root)), w, i, n);
        });
    }
}

/// One step, t = `step` counted from 1, as `torch.optim.AdamW` takes it:
/// `w *= 1 - lr wd`; `m += (1 - b1) (g - m)`; `v = b2 v + (1 - b2) g^2`;
/// `w -= lr / (1 - b1^t) m / (sqrt(v) / sqrt(1 - b2^t) + eps)`.
///
/// w, g, m, v: as many elements each, the moments f32 or bf16 (rounded to nearest); g is multiplied by `grad_scale` (clipping, averaging) as it is read.
///
/// # Panics
/// When lengths differ or the step is 0.
///
/// Loshchilov and Hutter, "Decoupled Weight Decay Regularization" (2019), algorithm 2.
pub fn adamw(
    cpu: &Cpu,
    cfg: &AdamW,
    step: u64,
    grad_scale: f32,
    w: &mut [f32],
    g: &[f32],
    m: ViewMut<'_>,
    v: ViewMut<'_>,
) {
    assert!(step > 0, "adamw: steps count from 1");
    for (what, len) in [("g", g.len()), ("m", m.len()), ("v", v.len())] {
        rows::expect_len("adamw", what, len, w.len());
    }
    let AdamW { lr, beta1, beta2, eps, weight_decay } = *cfg;
    let t = step as f64;
    let by = Scalars {
        grad: grad_scale,
        keep: (1.0 - lr * weight_decay) as f32,
        mean: (1.0 - beta1) as f32,
        beta2: beta2 as f32,
        square: (1.0 - beta2) as f32,
        root: (1.0 - beta2.powf(t)).sqrt() as f32,
        eps: eps as f32,
        step: (lr / (1.0 - beta1.powf(t))) as f32,
    };
    let (w, m, v) = (SharedMut::new(w), SharedView::new(m), SharedView::new(v));
    rows::over_blocks(cpu, g.len(), rows::FLAT_TILE, |from, to| {
        let len = to - from;
        // SAFETY: tasks own disjoint ranges.
        let (w, m, v) = unsafe { (w.slice(from, len), m.slice(from, len), v.slice(from, len)) };
        cpu.dispatch(Step { w, g: &g[from..to], m, v, by });
    });
}

#[cfg(test)]
mod tests {
    use minke_num::tolerance::Tolerance;

    use super::*;
    use crate::testing::{AWKWARD, everywhere, normal, wide};

    #[test]
    fn ten_steps_match_f64() {
        let cfg = AdamW { lr: 3e-3, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1 };
        for len in AWKWARD.into_iter().chain([0, 33_001]) {
            let start = normal(1, len);
            let got = everywhere("adamw", |cpu| {
                let (mut w, mut m, mut v) = (start.clone(), vec![0.0; len], vec![0.0; len]);
                for step in 1..=10 {
                    adamw(
                        cpu,
                        &cfg,
                        step,
                        0.5,
                        &mut w,
                        &normal(step + 1, len),
                        ViewMut::F32(&mut m),
                        ViewMut::F32(&mut v),
                    );
                }
                [w, m, v].concat()
            });
            let (mut w, mut m, mut v) = (wide(&start), vec![0.0; len], vec![0.0; len]);
            for step in 1..=10 {
                for (i, g) in normal(step + 1, len).into_iter().enumerate() {
                    let g = 0.5 * f64::from(g);
                    w[i] *= 1.0 - cfg.lr * cfg.weight_decay;
                    m[i] = cfg.beta1 * m[i] + (1.0 - cfg.beta1) * g;
                    v[i] = cfg.beta2 * v[i] + (1.0 - cfg.beta2) * g * g;
                    let mean = m[i] / (1.0 - cfg.beta1.powi(step as i32));
                    let root = (v[i] / (1.0 - cfg.beta2.powi(step as i32))).sqrt();
                    w[i] -= cfg.lr * mean / (root + cfg.eps);
                }
            }
            Tolerance::new(1e-6, 2e-6).check("adamw", &got, &[w, m, v].concat()).unwrap();
        }
    }

    /// `torch.optim.AdamW([tensor([1.0, -2.0])], lr=0.1, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)` after
    /// steps with gradients [0.5, -1.0] and [1e-4, 3.0].
    #[test]
    fn known_answers_of_torch() {
        let cfg = AdamW { lr: 0.1, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.01 };
        let (mut w, mut m, mut v) = ([1.0, -2.0], [0.0; 2], [0.0; 2]);
        let cpu = Cpu::detect(1);
        for (step, g) in [(1, [0.5, -1.0]), (2, [1e-4, 3.0])] {
            adamw(&cpu, &cfg, step, 1.0, &mut w, &g, ViewMut::F32(&mut m), ViewMut::F32(&mut v));
        }
        Tolerance::new(0.0, 3e-7).check("w", &w, &TORCH).unwrap();
    }

    const TORCH: [f64; 2] = [0.8310803174972534, -1.9455209970474243];
}
