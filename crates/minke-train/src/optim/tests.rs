//! Both optimizers against naive twins in f64.

use minke_cpu::{Cpu, DType};
use minke_model::Param;
use minke_model::spec::Role;
use minke_num::rng;
use minke_num::tolerance::{Tolerance, assert_same_bits};

use super::muon::orthogonalised;
use super::*;

#[derive(Clone)]
struct Params {
    entries: Vec<Param>,
    data: Vec<f32>,
    grad: Vec<f32>,
}

fn params(shapes: &[(&[usize], Role)]) -> Params {
    let (mut entries, mut at) = (Vec::new(), 0);
    for (i, (shape, role)) in shapes.iter().enumerate() {
        let len: usize = shape.iter().product();
        let (name, shape, range) = (format!("tensor.{i}"), shape.to_vec(), at..at + len);
        entries.push(Param { name, shape, role: *role, range, dtype: DType::F32 });
        at += len;
    }
    let mut data = vec![0.0; at];
    rng::fill_normal(1, 0, 0.1, &mut data);
    Params { entries, data, grad: vec![0.0; at] }
}

const SHAPES: [(&[usize], Role); 10] = [
    (&[19, 16], Role::Embedding),
    (&[16], Role::Norm),
    (&[24, 16], Role::AttentionLinear),
    (&[16, 24], Role::AttentionLinear),
    (&[4, 16], Role::Router),
    (&[4], Role::RouterBias),
    (&[40, 16], Role::ExpertLinear { expert: 0 }),
    (&[40, 16], Role::ExpertLinear { expert: 1 }),
    (&[16, 33], Role::FfnLinear),
    (&[19, 16], Role::Head),
];

fn settings(optimizer: recipe::Optimizer) -> Settings {
    let moments = recipe::Moments::Auto;
    Settings { optimizer, betas: [0.9, 0.95], moments, eps: 1e-8, weight_decay: 0.1, muon_momentum: 0.95 }
}

const RATES: Rates = Rates { adamw: 3e-3, muon: 2e-2 };
const GRAD_SCALE: f32 = 0.5;

fn steps(cpu: &Cpu, optimizer: recipe::Optimizer, count: u64) -> Params {
    let mut params = params(&SHAPES);
    let mut optimizer = Optimizer::new(&settings(optimizer), &params.entries, DType::F32);
    for step in 0..count {
        rng::fill_normal(2, step, 1.0, &mut params.grad);
        let grads = in_parts(&params.grad);
        optimizer.step(cpu, &mut params.data, &grads, RATES, GRAD_SCALE);
    }
    params
}

/// Gradients as a store has them: both experts are one weight.
fn in_parts(grad: &[f32]) -> Grads<'_> {
    let (mut parts, mut at) = (Vec::new(), 0);
    for (shape, role) in SHAPES {
        let len: usize = shape.iter().product();
        match (role, parts.last_mut()) {
            (Role::ExpertLinear { expert: 1 }, Some((start, part))) => *part = &grad[*start..at + len],
            _ => parts.push((at, &grad[at..at + len])),
        }
        at += len;
    }
    Grads::new(parts)
}

/// Row-major f64 product `a [m, k] b [k, n]`.
fn product(a: &[f64], b: &[f64], m: usize, k: usize, n: usize) -> Vec<f64> {
    let mut c = vec![0.0; m * n];
    for i in 0..m {
        for p in 0..k {
            for j in 0..n {
                c[i * n + j] += a[i * k + p] * b[p * n + j];
            }
        }
    }
    c
}

fn turned(x: &[f64], rows: usize, columns: usize) -> Vec<f64> {
    (0..rows * columns).map(|at| x[at % rows * columns + at / rows]).collect()
}

/// The definition of the iteration, without transposing first: X (a + b X'X + c (X'X)^2) has the same value.
fn orthogonalised_ref(x: &[f64], rows: usize, columns: usize) -> Vec<f64> {
    let norm = x.iter().map(|x| x * x).sum::<f64>().sqrt() + 1e-7;
    let mut x: Vec<f64> = x.iter().map(|x| x / norm).collect();
    for _ in 0..5 {
        let gram = product(&turned(&x, rows, columns), &x, columns, rows, columns);
        let square = product(&gram, &gram, columns, columns, columns);
        let cubic = product(&x, &gram, rows, columns, columns);
        let quintic = product(&x, &square, rows, columns, columns);
        for i in 0..x.len() {
            x[i] = 3.4445 * x[i] - 4.7750 * cubic[i] + 2.0315 * quintic[i];
        }
    }
    x
}

/// What the step is to do, one tensor at a time.
fn steps_ref(optimizer: recipe::Optimizer, count: u64) -> Vec<f64> {
    let params = params(&SHAPES);
    let len = params.data.len();
    let mut data: Vec<f64> = params.data.iter().map(|&x| f64::from(x)).collect();
    let (mut m, mut v) = (vec![0.0; len], vec![0.0; len]);
    let mut grad = vec![0.0; len];
    for step in 0..count {
        rng::fill_normal(2, step, 1.0, &mut grad);
        let t = step as i32 + 1;
        for (shape, role, range) in params.entries.iter().map(|p| (&p.shape, p.role, p.range.clone())) {
            let hidden = matches!(role, Role::AttentionLinear | Role::ExpertLinear { .. } | Role::FfnLinear);
            let decay = if shape.len() == 2 { 0.1 } else { 0.0 };
            let g: Vec<f64> =
                grad[range.clone()].iter().map(|&g| f64::from(g) * f64::from(GRAD_SCALE)).collect();
            if role == Role::RouterBias {
                continue;
            }
            if hidden && optimizer == recipe::Optimizer::Muon {
                let momentum = &mut m[range.clone()];
                let mut u = vec![0.0; g.len()];
                for i in 0..g.len() {
                    momentum[i] = 0.95 * momentum[i] + g[i];
                    u[i] = g[i] + 0.95 * momentum[i];
                }
                let x = orthogonalised_ref(&u, shape[0], shape[1]);
                let scale = RATES.muon * 0.2 * (shape[0].max(shape[1]) as f64).sqrt();
                for (w, x) in data[range].iter_mut().zip(x) {
                    *w = *w * (1.0 - RATES.muon * decay) - scale * x;
                }
                continue;
            }
            for (i, g) in range.zip(g) {
                data[i] *= 1.0 - RATES.adamw * decay;
                m[i] = 0.9 * m[i] + 0.1 * g;
                v[i] = 0.95 * v[i] + 0.05 * g * g;
                let (mean, square) = (m[i] / (1.0 - 0.9_f64.powi(t)), v[i] / (1.0 - 0.95_f64.powi(t)));
                data[i] -= RATES.adamw * mean / (square.sqrt() + 1e-8);
            }
        }
    }
    data
}

#[test]
fn ten_steps_match_f64() {
    let cpu = Cpu::detect(2);
    for (optimizer, tolerance) in [
        (recipe::Optimizer::AdamW, Tolerance::new(1e-6, 2e-6)),
        // the quintic is not contractive: rounding errors grow by its slope at 0, 3.4445^5 = 485, before they settle
        (recipe::Optimizer::Muon, Tolerance::new(2e-5, 2e-6)),
    ] {
        let got = steps(&cpu, optimizer, 10);
        tolerance.check(&format!("{optimizer:?}"), &got.data, &steps_ref(optimizer, 10)).unwrap();
        // the balance rule's bias is nobody else's
        let bias = params(&SHAPES).entries[5].range.clone();
        assert_same_bits("router bias", &got.data[bias.clone()], &params(&SHAPES).data[bias]);
    }
}

#[test]
fn threads_change_no_bit() {
    for optimizer in [recipe::Optimizer::AdamW, recipe::Optimizer::Muon] {
        let expected = steps(&Cpu::detect(1), optimizer, 3);
        // three matrices a thread and fewer take different ways
        for threads in [2, 3] {
            let got = steps(&Cpu::detect(threads), optimizer, 3);
            assert_same_bits(&format!("{optimizer:?} on {threads}"), &got.data, &expected.data);
        }
    }
}

#[test]
fn singular_values_are_near_one() {
    let cpu = Cpu::detect(1);
    for (rows, columns) in [(1, 1), (1, 7), (16, 16), (17, 40), (40, 17), (96, 192)] {
        let mut matrix = vec![0.0; rows * columns];
        rng::fill_normal(3, 0, 1.0, &mut matrix);
        let x: Vec<f64> =
            orthogonalised(&cpu, &matrix, rows, columns).iter().map(|&x| f64::from(x)).collect();
        // eigenvalues of the small gram matrix lie within its Gershgorin-free bounds: probe with power iteration
        let (small, wide) = if rows <= columns { (rows, x) } else { (columns, turned(&x, rows, columns)) };
        let gram =
            product(&wide, &turned(&wide, small, wide.len() / small), small, wide.len() / small, small);
        let largest = eigenvalue(&gram, small, 0.0);
        let smallest = 4.0 - eigenvalue(&gram, small, 4.0);
        // a square Gaussian has singular values near 0, which five iterations lift only so far
        let least = if rows == columns { 0.01 } else { 0.4 };
        assert!(largest.sqrt() < 1.25, "{rows} x {columns}: {}", largest.sqrt());
        assert!(smallest.sqrt() > least, "{rows} x {columns}: {}", smallest.sqrt());
    }
    assert!(orthogonalised(&cpu, &[0.0; 6], 2, 3).iter().all(|&x| x == 0.0));
}

/// The largest eigenvalue of `gram`, or of `shift I - gram` when a shift is given, by power iteration.
fn eigenvalue(gram: &[f64], n: usize, shift: f64) -> f64 {
    let matrix: Vec<f64> =
        (0..n * n)
            .map(|at| {
                if shift == 0.0 { gram[at] } else { shift * f64::from(u8::from(at / n == at % n)) - gram[at] }
            })
            .collect();
    let mut v: Vec<f64> = (0..n).map(|i| 1.0 + f64::from(rng::uniform(9, 0, i as u64))).collect();
    let mut value = 0.0;
    for _ in 0..2000 {
        let next = product(&matrix, &v, n, n, 1);
        value = next.iter().map(|x| x * x).sum::<f64>().sqrt();
        v = next.iter().map(|x| x / value).collect();
    }
    value
}

#[test]
fn state_is_listed_once_and_restores() {
    let cpu = Cpu::detect(1);
    let kinds = [recipe::Optimizer::AdamW, recipe::Optimizer::Muon];
    for (kind, moments) in kinds.into_iter().flat_map(|kind| [(kind, DType::F32), (kind, DType::Bf16)]) {
        let mut one = params(&SHAPES);
        let mut first = Optimizer::new(&settings(kind), &one.entries, moments);
        rng::fill_normal(2, 0, 1.0, &mut one.grad);
        first.step(&cpu, &mut one.data, &in_parts(&one.grad), RATES, 1.0);
        let mut other = one.clone();
        let mut second = Optimizer::new(&settings(kind), &other.entries, moments);
        for ((to_kind, to_entry, to), (kind, entry, from)) in
            second.state_mut().into_iter().zip(first.state())
        {
            assert_eq!((to_kind, to_entry), (kind, entry));
            match (to, from) {
                (ViewMut::F32(to), View::F32(from)) => to.copy_from_slice(from),
                (ViewMut::Bf16(to), View::Bf16(from)) => to.copy_from_slice(from),
                _ => panic!("{kind}: another dtype"),
            }
        }
        second.set_steps(first.steps());
        first.step(&cpu, &mut one.data, &in_parts(&one.grad), RATES, 1.0);
        second.step(&cpu, &mut other.data, &in_parts(&other.grad), RATES, 1.0);
        assert_same_bits("restored", &other.data, &one.data);
        let bytes: usize =
            first.state().iter().map(|(_, _, part)| part.len() * part.dtype().size_bytes()).sum();
        assert_eq!(first.bytes(), bytes);
    }
}
