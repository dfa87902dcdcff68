//! The right operand in the order in which the tile reads it.

use super::Compute;
use super::engine::{Engine, layout};
use super::tile::PANEL;
use super::{Operand, View};
use crate::cpu::{Cpu, SharedMut};
use crate::scratch::AlignedBuf;
use crate::simd::{Kernel, Level, Simd};

/// A right operand [groups, k, n] cut into panels of 32 columns: step `p` of a panel holds 32 words.
///
/// Made once per optimizer step for each direction of a weight, reused by every product until the weight changes.
pub struct Packed {
    buf: AlignedBuf,
    level: Level,
    pub(super) compute: Compute,
    pub(super) groups: usize,
    pub(super) n: usize,
    pub(super) k: usize,
    pub(super) steps: usize,
}

impl Packed {
    /// An empty operand whose memory the first packing makes.
    pub fn empty() -> Self {
        let (level, compute) = (Level::SCALAR, Compute::F32);
        Self { buf: AlignedBuf::default(), level, compute, groups: 0, n: 0, k: 0, steps: 0 }
    }

    /// Packs weights `w` [groups, n, k] (rows along the depth) for y = x Wᵀ.
    pub fn pack_nt(&mut self, cpu: &Cpu, w: View<'_>, groups: usize, n: usize, k: usize, compute: Compute) {
        self.pack(cpu, w, [groups, n, k], compute, true);
    }

    /// Packs weights `w` [groups, k, n] (rows across the depth) for dx = dy W.
    pub fn pack_nn(&mut self, cpu: &Cpu, w: View<'_>, groups: usize, k: usize, n: usize, compute: Compute) {
        self.pack(cpu, w, [groups, n, k], compute, false);
    }

    fn pack(
        &mut self,
        cpu: &Cpu,
        w: View<'_>,
        [groups, n, k]: [usize; 3],
        compute: Compute,
        transposed: bool,
    ) {
        assert_eq!(w.len(), groups * n * k, "pack: {groups} groups of {n} x {k}");
        let (steps, _) = layout(cpu.level(), compute, k);
        (self.level, self.compute) = (cpu.level(), compute);
        (self.groups, self.n, self.k, self.steps) = (groups, n, k, steps);
        let panels = n.div_ceil(PANEL);
        let words = steps * PANEL;
        let out: &mut [u32] = self.buf.get(groups * panels * words);
        let out = SharedMut::new(out);
        cpu.run(groups * panels, |i| {
            // SAFETY: each task has its own panel.
            let out = unsafe { out.slice(i * words, words) };
            let (group, panel) = (i / panels, i % panels);
            let task = Task { w, group, first: panel * PANEL, n, k, compute, transposed, out };
            cpu.level().dispatch_product(task);
        });
    }

    /// The packed words of all panels of a group.
    #[inline(always)]
    pub(super) fn panels(&self, group: usize) -> &[u32] {
        let words = self.steps * PANEL * self.n.div_ceil(PANEL);
        let all: &[u32] = self.buf.view(self.groups * words);
        &all[group * words..][..words]
    }

    /// Panics when it was packed for another level.
    pub(super) fn check(&self, cpu: &Cpu) {
        assert_eq!(self.level, cpu.level(), "matmul: the right operand was packed for another level");
    }

    /// Columns of a product with one of its groups.
    pub fn columns(&self) -> usize {
        self.n
    }

    /// Depth of a product with it.
    pub fn depth(&self) -> usize {
        self.k
    }

    /// Bytes that packing [groups, k, n] takes on a level.
    pub fn bytes_of(level: Level, compute: Compute, groups: usize, k: usize, n: usize) -> usize {
        let words = layout(level, compute, k).0 * PANEL;
        groups * n.div_ceil(PANEL) * words * size_of::<u32>()
    }

    /// Memory held.
    pub fn bytes(&self) -> usize {
        self.buf.capacity_bytes()
    }
}

struct Task<'a> {
    w: View<'a>,
    group: usize,
    first: usize,
    n: usize,
    k: usize,
    compute: Compute,
    transposed: bool,
    out: &'a mut [u32],
}

impl Kernel for Task<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Task { w, group, first, n, k, compute, transposed, out } = self;
        let engine = Engine::new(s, compute);
        let w = w.slice(group * n * k, (group + 1) * n * k);
        let width = PANEL.min(n - first);
        if transposed {
            engine.pack_columns(&Operand::new(w, k), first..first + width, out);
        } else {
            engine.pack_strips(&Operand::new(w, n), 0..k, first..first + width, PANEL, 0, out);
        }
    }
}
