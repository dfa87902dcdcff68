//! Muon: the momentum of a matrix, replaced by the nearest matrix with equal singular values.
//!
//! ```text
//! M = mu M + G                  u = G + mu M                       (Nesterov)
//! X = u / |u|_F                 five times: A = X X', X = (a I + b A + c A A) X
//! W = W (1 - lr decay) - lr 0.2 sqrt(max(rows, columns)) X
//! ```
//!
//! The quintic with a, b, c drives all singular values to about 1 (0.7 to 1.2) without ever computing them. A matrix
//! with more rows than columns is transposed first, so that A is the smaller square. The factor
//! `0.2 sqrt(max(rows, columns))` gives the update the root mean square of `AdamW`'s, 0.2 whatever the shape, so
//! that rates and decay mean the same in both.
//!
//! Numerics: f32 throughout, sums over depth in ascending order, the norm by [`sum_squares`]. The iteration corrects
//! itself and bf16 would do, but only machines with bf16 products would gain. One matrix is one task of one thread;
//! with fewer matrices than threads could share, the products are shared instead. Both give the same bits.
//!
//! Paper: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks"; Liu et al. 2025, "Muon is
//! Scalable for LLM Training", section 2.2 for decay and scale.

use std::sync::Mutex;

use minke_cpu::gemm::{Compute, Operand, Packed, matmul};
use minke_cpu::reduce::sum_squares;
use minke_cpu::{Cpu, View, ViewMut};
use minke_model::Param;
use minke_tensor::Grads;

use super::{Settings, Slot, cut, cut_mut, slots};

/// Coefficients a, b, c of the quintic: steep at zero, not convergent, good enough after few iterations.
const QUINTIC: [f32; 3] = [3.4445, -4.7750, 2.0315];
/// Iterations.
const ITERATIONS: usize = 5;
/// Root mean square of an update at a rate of 1, as `AdamW` has it.
const UPDATE_RMS: f64 = 0.2;
/// Added to the norm: a gradient of zero is an update of zero.
const NORM_EPS: f64 = 1e-7;
/// Side of the blocks in which matrices are transposed.
const TRANSPOSE_BLOCK: usize = 16;

/// The matrices trained by Muon and their momentum.
#[derive(Debug)]
pub struct Group {
    settings: Settings,
    slots: Vec<Slot>,
    /// Rows and columns of each.
    shapes: Vec<(usize, usize)>,
    /// Dearest first, so that threads end together.
    order: Vec<usize>,
    momentum: Vec<f32>,
    /// One for each thread that ever worked at once.
    workspaces: Mutex<Vec<Workspace>>,
}

/// Working memory of one matrix.
pub(super) struct Workspace {
    /// The matrix, wide, [m, n].
    x: Vec<f32>,
    /// X X', [m, m].
    gram: Vec<f32>,
    /// The polynomial in it, [m, m].
    poly: Vec<f32>,
    packed: Packed,
}

impl std::fmt::Debug for Workspace {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Workspace").field("elements", &self.x.len()).finish_non_exhaustive()
    }
}

/// The parts of one matrix in a step.
struct Task<'a> {
    weight: &'a mut [f32],
    momentum: &'a mut [f32],
    grad: &'a [f32],
}

/// The scalars of one step.
#[derive(Clone, Copy)]
struct Scalars {
    lr: f64,
    weight_decay: f64,
    momentum: f32,
    grad_scale: f32,
}

impl Group {
    /// Fresh momentum for these matrices.
    pub(super) fn new(settings: &Settings, chosen: &[(usize, &Param)]) -> Self {
        let (slots, total) = slots(chosen);
        let shapes: Vec<(usize, usize)> = chosen
            .iter()
            .map(|(_, param)| match param.shape[..] {
                [rows, columns] => (rows, columns),
                _ => panic!("muon: `{}` {:?} is no matrix", param.name, param.shape),
            })
            .collect();
        let cost = |&(rows, columns): &(usize, usize)| {
            let small = rows.min(columns);
            small * small * (2 * rows.max(columns) + small)
        };
        let mut order: Vec<usize> = (0..slots.len()).collect();
        order.sort_by_key(|&i| std::cmp::Reverse(cost(&shapes[i])));
        let (momentum, workspaces) = (vec![0.0; total], Mutex::default());
        Self { settings: *settings, slots, shapes, order, momentum, workspaces }
    }

    /// One step of every matrix.
    pub(super) fn step(&mut self, cpu: &Cpu, lr: f64, grad_scale: f32, data: &mut [f32], grads: &Grads<'_>) {
        let Self { settings, slots, shapes, order, momentum, workspaces } = self;
        // shared by the tasks
        let workspaces = &*workspaces;
        let by = Scalars {
            lr,
            weight_decay: settings.weight_decay,
            momentum: settings.muon_momentum as f32,
            grad_scale,
        };
        let mut tasks = Vec::with_capacity(slots.len());
        let (mut data, mut momentum, mut at) = (data, &mut momentum[..], 0);
        for slot in slots.iter() {
            let (_, rest) = data.split_at_mut(slot.range.start - at);
            let (weight, rest) = rest.split_at_mut(slot.len());
            let (part, left) = momentum.split_at_mut(slot.len());
            (data, momentum, at) = (rest, left, slot.range.end);
            // a lock only hands the parts over: each is taken once
            tasks.push(Mutex::new(Task { weight, momentum: part, grad: grads.of(slot.range.clone()) }));
        }
        let update = |i: usize| {
            let at = order[i];
            let mut space = take(workspaces);
            let mut task = tasks[at].lock().expect("no task panics while it holds its matrix");
            update(cpu, by, shapes[at], &mut task, &mut space);
            workspaces.lock().expect("taking and giving back does not panic").push(space);
        };
        if order.len() < 2 * cpu.threads() {
            (0..order.len()).for_each(update);
        } else {
            cpu.run(order.len(), update);
        }
    }

    pub(super) fn bytes(&self) -> usize {
        4 * self.momentum.len()
    }

    pub(super) fn state(&self) -> Vec<(&'static str, usize, View<'_>)> {
        cut("muon.momentum", &self.slots, View::F32(&self.momentum))
    }

    pub(super) fn state_mut(&mut self) -> Vec<(&'static str, usize, ViewMut<'_>)> {
        cut_mut("muon.momentum", &self.slots, ViewMut::F32(&mut self.momentum))
    }
}

fn take(workspaces: &Mutex<Vec<Workspace>>) -> Workspace {
    let free = workspaces.lock().expect("taking and giving back does not panic").pop();
    free.unwrap_or_else(Workspace::new)
}

fn update(
    cpu: &Cpu,
    by: Scalars,
    (rows, columns): (usize, usize),
    task: &mut Task<'_>,
    space: &mut Workspace,
) {
    let Task { weight, momentum, grad } = task;
    let tall = rows > columns;
    let x = space.make(rows, columns);
    for ((x, momentum), grad) in x.iter_mut().zip(momentum.iter_mut()).zip(*grad) {
        let grad = grad * by.grad_scale;
        *momentum = by.momentum * *momentum + grad;
        *x = grad + by.momentum * *momentum;
    }
    if tall {
        space.transpose(rows, columns);
    }
    space.orthogonalise(cpu, rows.min(columns), rows.max(columns));
    if tall {
        space.transpose(columns, rows);
    }
    let keep = (1.0 - by.lr * by.weight_decay) as f32;
    let scale = (by.lr * UPDATE_RMS * (rows.max(columns) as f64).sqrt()) as f32;
    for (weight, x) in weight.iter_mut().zip(&space.x) {
        *weight = *weight * keep - scale * x;
    }
}

impl Workspace {
    pub(super) fn new() -> Self {
        Self { x: Vec::new(), gram: Vec::new(), poly: Vec::new(), packed: Packed::empty() }
    }

    /// Room for a matrix; the contents are unspecified.
    fn make(&mut self, rows: usize, columns: usize) -> &mut [f32] {
        let small = rows.min(columns);
        self.x.resize(rows * columns, 0.0);
        self.gram.resize((small * small).max(rows * columns), 0.0);
        self.poly.resize(small * small, 0.0);
        &mut self.x
    }

    /// Turns the matrix [rows, columns] in `x` over.
    fn transpose(&mut self, rows: usize, columns: usize) {
        let (from, to) = (&self.x, &mut self.gram[..rows * columns]);
        for top in (0..rows).step_by(TRANSPOSE_BLOCK) {
            for left in (0..columns).step_by(TRANSPOSE_BLOCK) {
                for i in top..rows.min(top + TRANSPOSE_BLOCK) {
                    for j in left..columns.min(left + TRANSPOSE_BLOCK) {
                        to[j * rows + i] = from[i * columns + j];
                    }
                }
            }
        }
        self.x.copy_from_slice(to);
    }

    /// Makes the singular values of `x` [m, n], m at most n, about 1.
    fn orthogonalise(&mut self, cpu: &Cpu, m: usize, n: usize) {
        let Self { x, gram, poly, packed } = self;
        let gram = &mut gram[..m * m];
        let one = [0, m as u32];
        let [a, b, c] = QUINTIC;
        let scale = (1.0 / (sum_squares(cpu, &[x]).sqrt() + NORM_EPS)) as f32;
        for x in x.iter_mut() {
            *x *= scale;
        }
        for _ in 0..ITERATIONS {
            packed.pack_nt(cpu, View::F32(x), 1, m, n, Compute::F32);
            matmul(cpu, Operand::new(View::F32(x), n), &one, packed, ViewMut::F32(gram), false);
            // symmetric to the bit: as it lies it is its transpose, and that is the faster way to pack
            packed.pack_nn(cpu, View::F32(gram), 1, m, m, Compute::F32);
            matmul(cpu, Operand::new(View::F32(gram), m), &one, packed, ViewMut::F32(poly), false);
            for (poly, gram) in poly.iter_mut().zip(&*gram) {
                *poly = c * *poly + b * gram;
            }
            for i in 0..m {
                poly[i * m + i] += a;
            }
            packed.pack_nn(cpu, View::F32(x), 1, m, n, Compute::F32);
            matmul(cpu, Operand::new(View::F32(poly), m), &one, packed, ViewMut::F32(x), false);
        }
    }
}

/// The orthogonalised form of a matrix [rows, columns], for tests and for those who want to look at it.
pub fn orthogonalised(cpu: &Cpu, matrix: &[f32], rows: usize, columns: usize) -> Vec<f32> {
    assert_eq!(matrix.len(), rows * columns, "orthogonalised: a matrix of {rows} x {columns}");
    let mut space = Workspace::new();
    space.make(rows, columns).copy_from_slice(matrix);
    if rows > columns {
        space.transpose(rows, columns);
    }
    space.orthogonalise(cpu, rows.min(columns), rows.max(columns));
    if rows > columns {
        space.transpose(columns, rows);
    }
    space.x
}
