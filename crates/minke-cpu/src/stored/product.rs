//! y = x Wᵀ with W as it is stored in blocks.

use std::marker::PhantomData;
use std::ops::Range;

use minke_num::blocks::BlockFormat;

use super::chunk::{self, BLOCKS, STORED_CHUNK, Unpack};
use super::inputs::Inputs;
use super::tile::{self, BytesTile, COLUMNS};
use super::{Form, StoredWeight};
use crate::cpu::Cpu;
use crate::gemm::Operand;
use crate::rows::{SharedView, store};
use crate::scratch;
use crate::simd::{Kernel, LANES, Simd};
use crate::view::ViewMut;

/// Rows up to which each row of the weight is unpacked for itself and multiplied with all of them; with more, columns of the
/// output are unpacked together and multiplied by tiles. No bit depends on it.
const FEW: usize = 6;

/// Bytes of the weight of a task, about.
const TASK_BYTES: usize = 64 * 1024;

/// `with_format!(format, F => expression)`: the expression with the type that unpacks the format.
macro_rules! with_format {
    ($format:expr, $f:ident => $body:expr) => {
        with_format!(@ $format, $f => $body; Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2K Q3K Q4K Q5K Q6K Iq4Nl Iq4Xs)
    };
    (@ $format:expr, $f:ident => $body:expr; $($name:ident)*) => {
        match $format {
            $(BlockFormat::$name => {
                type $f = chunk::$name;
                $body
            })*
        }
    };
}

/// The products of a group, or of a part of it, that one call of a kernel makes.
struct Task<'a> {
    x: &'a Inputs,
    /// Rows of `x` and of the output.
    rows: Range<usize>,
    /// Stored rows, one after the other.
    bytes: &'a [u8],
    row_bytes: usize,
    cols: usize,
    out: &'a SharedView,
    /// Row length of the output, and where the first stored row's column is.
    n: usize,
    column: usize,
}

/// As [`super::matmul_stored`], for weights in blocks; shapes are checked there.
pub(super) fn matmul(cpu: &Cpu, a: Operand<'_>, offsets: &[u32], w: &StoredWeight, c: ViewMut<'_>) {
    let mut inputs: [Option<Inputs>; 2] = [None, None];
    for part in w.parts() {
        let Form::Blocks(format) = part.form else { unreachable!("a weight in blocks") };
        let block = block_of(format);
        inputs[usize::from(block == 16)].get_or_insert_with(|| Inputs::new(cpu, a, block));
    }
    let out = SharedView::new(c);
    // tasks are parts of stored matrices, so that each reads one piece of memory
    let mut tasks: Vec<(usize, Range<usize>, Range<usize>)> = Vec::new();
    for (group, span) in offsets.windows(2).enumerate() {
        let rows = span[0] as usize..span[1] as usize;
        if rows.is_empty() {
            continue;
        }
        for (p, part) in w.group(group).iter().enumerate() {
            let row_bytes = part.bytes.len() / part.rows.max(1);
            let least = (TASK_BYTES / row_bytes.max(1)).max(1);
            // enough tasks for all threads, where a matrix is small
            let each = least.min(part.rows.div_ceil(4 * cpu.threads())).next_multiple_of(COLUMNS);
            let stored = group * w.parts_per_group() + p;
            for first in (0..part.rows).step_by(each) {
                tasks.push((stored, rows.clone(), first..part.rows.min(first + each)));
            }
        }
    }
    cpu.run(tasks.len(), |i| {
        let (stored, rows, columns) = tasks[i].clone();
        let part = &w.parts()[stored];
        let Form::Blocks(format) = part.form else { unreachable!("a weight in blocks") };
        let row_bytes = part.bytes.len() / part.rows;
        let before: usize = w.parts()[stored / w.parts_per_group() * w.parts_per_group()..stored]
            .iter()
            .map(|part| part.rows)
            .sum();
        let x = inputs[usize::from(block_of(format) == 16)].as_ref().expect("coded above");
        let task = Task {
            x,
            rows,
            bytes: &part.bytes[columns.start * row_bytes..columns.end * row_bytes],
            row_bytes,
            cols: w.cols,
            out: &out,
            n: w.rows,
            column: before + columns.start,
        };
        with_format!(format, F => cpu.level().dispatch_product(Run::<F> { task, format: PhantomData }));
    });
}

/// Elements that share a scale in a format.
fn block_of(format: BlockFormat) -> usize {
    match format {
        BlockFormat::Q4_0
        | BlockFormat::Q4_1
        | BlockFormat::Q5_0
        | BlockFormat::Q5_1
        | BlockFormat::Q8_0
        | BlockFormat::Q4K
        | BlockFormat::Q5K
        | BlockFormat::Iq4Nl
        | BlockFormat::Iq4Xs => 32,
        BlockFormat::Q2K | BlockFormat::Q3K | BlockFormat::Q6K => 16,
    }
}

struct Run<'a, F> {
    task: Task<'a>,
    format: PhantomData<F>,
}

impl<F: Unpack> Kernel for Run<'_, F> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        if self.task.rows.len() <= FEW {
            few::<S, F>(s, &self.task);
        } else {
            many::<S, F>(s, &self.task);
        }
    }
}

/// Every stored row with a few rows: blocks of a chunk in lanes, chunk after chunk.
#[inline(always)]
fn few<S: Simd, F: Unpack>(s: S, task: &Task<'_>) {
    let chunks = task.x.stride / F::LEN;
    let mut room = [0; STORED_CHUNK];
    let m = task.rows.len();
    for i in 0..task.bytes.len() / task.row_bytes {
        let mut sums = [s.zero(); FEW];
        for c in 0..chunks {
            let bytes = chunk::whole::<F>(task.bytes, i * task.row_bytes, c, &mut room);
            let [scale, min] = F::scales(s, bytes);
            let q = F::vectors(s, bytes);
            for (j, sum) in sums[..m].iter_mut().enumerate() {
                let (codes, scales, block_sums) = task.x.row(task.rows.start + j);
                let dots = s.block_dots(q, &codes[c * F::LEN..][..F::LEN]);
                let block_sums = s.load(array(block_sums, c));
                let dots = if F::OFFSET == 0 {
                    dots
                } else {
                    s.fma(s.splat(-f32::from(F::OFFSET)), block_sums, dots)
                };
                let mut part = s.mul(dots, scale);
                if F::MIN {
                    part = s.fma(min, block_sums, part);
                }
                *sum = s.fma(part, s.load(array(scales, c)), *sum);
            }
        }
        for (j, sum) in sums[..m].iter().enumerate() {
            let at = (task.rows.start + j) * task.n + task.column + i;
            // SAFETY: rows and columns of this task alone.
            match unsafe { task.out.slice(at, 1) } {
                ViewMut::F32(out) => out[0] = s.sum(*sum),
                ViewMut::Bf16(out) => out[0] = minke_num::bf16::from_f32(s.sum(*sum)),
            }
        }
    }
}

/// The `i`-th sixteen.
#[inline(always)]
fn array(x: &[f32], i: usize) -> &[f32; LANES] {
    x[i * LANES..][..LANES].try_into().expect("sixteen")
}

/// Columns of the output unpacked together, and tiles of rows.
#[inline(always)]
fn many<S: Simd, F: Unpack>(s: S, task: &Task<'_>) {
    let blocks = task.cols / F::BLOCK;
    let mut panel = scratch::take::<u8>(blocks.next_multiple_of(BLOCKS) * F::BLOCK * COLUMNS);
    let mut scale = scratch::take::<f32>(blocks.next_multiple_of(BLOCKS) * COLUMNS);
    let mut min = scratch::take::<f32>(if F::MIN { scale.len() } else { 0 });
    let mut sums = [0.0f32; tile::ROWS * COLUMNS];
    let all = task.bytes.len() / task.row_bytes;
    for first in (0..all).step_by(COLUMNS) {
        let width = COLUMNS.min(all - first);
        tile::pack::<S, F>(
            s,
            task.bytes,
            |j| (j < width).then(|| (first + j) * task.row_bytes),
            blocks,
            &mut panel,
            &mut scale,
            &mut min,
        );
        let mut from = task.rows.start;
        while from < task.rows.end {
            let rows = (task.rows.end - from).min(S::BYTES_ROWS);
            let (x, x_scale, x_sum) = task.x.row(from);
            let t = BytesTile {
                q: panel.as_ptr(),
                scale: scale.as_ptr(),
                min: if F::MIN { min.as_ptr() } else { std::ptr::null() },
                offset: F::OFFSET,
                block: F::BLOCK,
                blocks,
                x: x.as_ptr(),
                x_row: task.x.stride,
                x_scale: x_scale.as_ptr(),
                x_sum: x_sum.as_ptr(),
                x_blocks: task.x.blocks(),
                out: sums.as_mut_ptr(),
            };
            // SAFETY: panel, rows and their scales have `blocks` blocks, `sums` room for the largest tile.
            unsafe { s.bytes_tile(t, rows) };
            for r in 0..rows {
                // SAFETY: rows and columns of this task alone.
                let mut out = unsafe { task.out.slice((from + r) * task.n + task.column + first, width) };
                for at in (0..width).step_by(LANES) {
                    let n = LANES.min(width - at);
                    let sum: &[f32; LANES] = sums[r * COLUMNS + at..][..LANES].try_into().expect("sixteen");
                    store(s, s.load(sum), &mut out, at, n);
                }
            }
            from += rows;
        }
    }
}
