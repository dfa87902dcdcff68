//! Matrices as they lie in a file, row by row: what a model that only runs reads, without a copy.

mod bytes;
pub(crate) mod chunk;
pub(crate) mod inputs;
pub(crate) mod panels;
mod product;
#[cfg(test)]
mod tests;
pub(crate) mod tile;

use std::sync::Arc;

use minke_num::blocks::{self, BlockFormat};
use minke_num::fp8::{BLOCK, e4m3_to_f32};
use minke_num::{bf16, f16};

use crate::cpu::Cpu;
use crate::fp8::{Fp8, Values};
use crate::gemm::{self, ByRow, Compute, Matrix8, Operand, Right8};
use crate::view::{View, ViewMut};

pub use bytes::{Bytes, Owner, bring_near};
pub use panels::lay;
use panels::{Laid, Panels};

/// What the elements of a stored matrix are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Form {
    /// Little-endian f32.
    F32,
    /// Little-endian f16.
    F16,
    /// Little-endian bf16.
    Bf16,
    /// E4M3, with a scale for each square of 128 by 128.
    E4m3,
    /// Blocks of a few bits per weight.
    Blocks(BlockFormat),
}

impl Form {
    /// Bytes of a row of `cols` elements; `None` where blocks do not fill it.
    pub fn row_bytes(self, cols: usize) -> Option<usize> {
        match self {
            Self::F32 => cols.checked_mul(4),
            Self::F16 | Self::Bf16 => cols.checked_mul(2),
            Self::E4m3 => Some(cols),
            Self::Blocks(format) => format.row_bytes(cols),
        }
    }
}

/// What products with a stored matrix multiply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Multiplied {
    /// Numbers, whatever they are stored as.
    Numbers(Compute),
    /// Integers of blocks; see [`matmul_stored`].
    Blocks,
    /// Codes of E4M3, by codes of activations; see [`matmul8_stored`].
    Codes,
}

/// A matrix [rows, cols] as it lies in a file, row-major, at any alignment.
#[derive(Clone, Debug)]
pub struct Stored {
    /// What its elements are.
    pub form: Form,
    /// Rows (outputs).
    pub rows: usize,
    /// Columns (inputs).
    pub cols: usize,
    /// Its elements.
    pub bytes: Bytes,
    /// Of E4M3: [`scale_shape`](minke_num::fp8::scale_shape) of them.
    scales: Arc<[f32]>,
    multiplied: Multiplied,
    /// The same for all clones.
    laid: Arc<Laid>,
}

impl Stored {
    /// A matrix over bytes; products multiply what it is stored as, which for f16 is f32.
    ///
    /// # Panics
    /// When they are not as many as it has, or in E4M3.
    pub fn new(form: Form, rows: usize, cols: usize, bytes: Bytes) -> Self {
        assert!(form != Form::E4m3, "stored: E4M3 without scales");
        Self::of(form, rows, cols, bytes, Arc::default())
    }

    /// A matrix in E4M3 over its codes.
    ///
    /// # Panics
    /// When there are not as many codes or scales as it has.
    pub fn coded(rows: usize, cols: usize, codes: Bytes, scales: Arc<[f32]>) -> Self {
        let shape = minke_num::fp8::scale_shape(rows, cols);
        assert_eq!(scales.len(), shape.iter().product(), "stored: scales of {rows} x {cols}");
        Self::of(Form::E4m3, rows, cols, codes, scales)
    }

    fn of(form: Form, rows: usize, cols: usize, bytes: Bytes, scales: Arc<[f32]>) -> Self {
        let expected = form.row_bytes(cols).and_then(|row| row.checked_mul(rows));
        assert_eq!(Some(bytes.len()), expected, "stored: {rows} x {cols} of {form:?}");
        let multiplied = match form {
            Form::F32 | Form::F16 => Multiplied::Numbers(Compute::F32),
            Form::Bf16 => Multiplied::Numbers(Compute::Bf16),
            Form::E4m3 => Multiplied::Codes,
            Form::Blocks(_) => Multiplied::Blocks,
        };
        Self { form, rows, cols, bytes, scales, multiplied, laid: Arc::default() }
    }

    /// The same matrix, with products of its numbers: made of what is stored at every product.
    pub fn as_numbers(self, compute: Compute) -> Self {
        Self { multiplied: Multiplied::Numbers(compute), laid: Arc::default(), ..self }
    }

    /// What products with it multiply.
    pub fn multiplied(&self) -> Multiplied {
        self.multiplied
    }

    /// Whether its bytes are what products multiply, in their order.
    fn is_as_multiplied(&self) -> bool {
        match (self.form, self.multiplied) {
            (Form::F32, Multiplied::Numbers(compute)) => compute == Compute::F32,
            (Form::Bf16, Multiplied::Numbers(compute)) => compute == Compute::Bf16,
            (Form::E4m3, Multiplied::Codes) | (Form::Blocks(_), Multiplied::Blocks) => true,
            (Form::F32 | Form::F16 | Form::Bf16 | Form::E4m3 | Form::Blocks(_), _) => false,
        }
    }

    /// As codes with scales.
    fn matrix8(&self) -> Matrix8<'_> {
        Matrix8 { codes: &self.bytes, scales: &self.scales, rows: self.rows, cols: self.cols }
    }

    /// The bytes of a row.
    fn row_bytes(&self, i: usize) -> &[u8] {
        let len = self.bytes.len() / self.rows;
        &self.bytes[i * len..][..len]
    }

    /// A row as numbers.
    ///
    /// # Panics
    /// When there is none, or `out` has another length.
    pub fn numbers_into(&self, i: usize, out: &mut [f32]) {
        assert_eq!(out.len(), self.cols, "stored: room for a row");
        let bytes = self.row_bytes(i);
        match self.form {
            Form::F32 => {
                for (x, four) in out.iter_mut().zip(bytes.as_chunks::<4>().0) {
                    *x = f32::from_le_bytes(*four);
                }
            }
            Form::F16 => {
                for (x, two) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                    *x = f16::from_le_bytes(*two).to_f32();
                }
            }
            Form::Bf16 => {
                for (x, two) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                    *x = bf16::from_le_bytes(*two).to_f32();
                }
            }
            Form::E4m3 => {
                let across = self.cols.div_ceil(BLOCK);
                let scales = &self.scales[i / BLOCK * across..][..across];
                for ((out, codes), scale) in out.chunks_mut(BLOCK).zip(bytes.chunks(BLOCK)).zip(scales) {
                    for (x, &code) in out.iter_mut().zip(codes) {
                        *x = e4m3_to_f32(code) * scale;
                    }
                }
            }
            Form::Blocks(format) => blocks::decode(format, bytes, out),
        }
    }
}

/// A weight [groups, rows, cols] whose matrices lie in files: one for each group, or several that are stacked in its rows.
#[derive(Clone, Debug)]
pub struct StoredWeight {
    parts: Vec<Stored>,
    groups: usize,
    /// Rows (outputs) of a group.
    pub rows: usize,
    /// Columns (inputs).
    pub cols: usize,
}

impl StoredWeight {
    /// Matrices in the order of groups, as many for each.
    ///
    /// # Panics
    /// When there are none, or their shapes do not make a weight, or products with them multiply different things.
    pub fn new(groups: usize, parts: Vec<Stored>) -> Self {
        assert!(
            groups > 0 && !parts.is_empty() && parts.len().is_multiple_of(groups),
            "stored weight: {groups} groups"
        );
        let each = parts.len() / groups;
        let (cols, multiplied) = (parts[0].cols, parts[0].multiplied);
        let shape = |group: &[Stored]| group.iter().map(|part| part.rows).collect::<Vec<_>>();
        for group in parts.chunks(each) {
            assert_eq!(shape(group), shape(&parts[..each]), "stored weight: groups of one shape");
            for part in group {
                assert_eq!(part.cols, cols, "stored weight: matrices of one width");
                assert_eq!(part.multiplied, multiplied, "stored weight: matrices of {:?}", part.form);
            }
        }
        let rows = shape(&parts[..each]).iter().sum();
        Self { parts, groups, rows, cols }
    }

    /// All matrices, in the order of groups.
    pub fn parts(&self) -> &[Stored] {
        &self.parts
    }

    /// Matrices of a group.
    pub fn parts_per_group(&self) -> usize {
        self.parts.len() / self.groups
    }

    /// The matrices of one group.
    pub fn group(&self, group: usize) -> &[Stored] {
        &self.parts[group * self.parts_per_group()..][..self.parts_per_group()]
    }

    /// Groups.
    pub fn groups(&self) -> usize {
        self.groups
    }

    /// What products with it multiply.
    pub fn multiplied(&self) -> Multiplied {
        self.parts[0].multiplied
    }

    /// The words of the i-th matrix of a group, packed for products, once all matrices of numbers have been laid so.
    fn packed<'a>(&'a self) -> Option<impl Fn(usize, usize) -> &'a [u32] + Sync> {
        let laid: Option<Vec<&[u32]>> =
            self.parts.iter().map(|part| Some(part.laid.get()?.words())).collect();
        let each = self.parts_per_group();
        laid.map(|laid| move |group: usize, i: usize| laid[group * each + i])
    }

    /// The matrix and its row that is row `i` of a group.
    fn place(&self, group: usize, mut i: usize) -> (&Stored, usize) {
        for part in self.group(group) {
            if i < part.rows {
                return (part, i);
            }
            i -= part.rows;
        }
        unreachable!("row {i} beyond a group of {}", self.rows)
    }

    /// Row `i` of a group as numbers.
    ///
    /// # Panics
    /// When there is none, or `out` has another length.
    pub fn numbers_into(&self, group: usize, i: usize, out: &mut [f32]) {
        let (part, i) = self.place(group, i);
        part.numbers_into(i, out);
    }

    /// Gives back the memory of rows that were looked up, where products do not read them: a file's pages come with many others.
    pub fn forget_rows(&self) {
        self.parts.iter().filter(|part| part.laid.get().is_some()).for_each(|part| part.bytes.forget());
    }

    /// Bytes of all matrices.
    pub fn bytes(&self) -> usize {
        self.parts.iter().map(|part| part.bytes.len()).sum()
    }
}

impl ByRow for StoredWeight {
    fn row<'r>(&'r self, group: usize, i: usize, room: &'r mut [f32]) -> View<'r> {
        let (part, i) = self.place(group, i);
        part.row(0, i, room)
    }

    fn lying(&self, group: usize, i: usize) -> (&[u8], usize) {
        let (part, i) = self.place(group, i);
        part.lying(0, i)
    }

    fn lies_as_multiplied(&self) -> bool {
        self.parts.iter().all(Stored::is_as_multiplied)
    }
}

/// One group.
impl ByRow for Stored {
    /// As it lies there, where its alignment allows it.
    fn row<'r>(&'r self, _: usize, i: usize, room: &'r mut [f32]) -> View<'r> {
        let bytes = self.row_bytes(i);
        match self.form {
            Form::F32 => {
                if let Ok(row) = bytemuck::try_cast_slice(bytes) {
                    return View::F32(row);
                }
            }
            Form::Bf16 => {
                if let Ok(row) = bytemuck::try_cast_slice(bytes) {
                    return View::Bf16(row);
                }
            }
            Form::F16 | Form::E4m3 | Form::Blocks(_) => {}
        }
        self.numbers_into(i, room);
        View::F32(room)
    }

    fn lying(&self, _: usize, i: usize) -> (&[u8], usize) {
        let row_bytes = self.bytes.len() / self.rows;
        (&self.bytes[i * row_bytes..], row_bytes)
    }

    fn lies_as_multiplied(&self) -> bool {
        self.is_as_multiplied()
    }
}

/// `c[i] = a[i] W_g(i)ᵀ` for every row: a [rows, k], W [groups, n, k] as stored, c [rows, n].
///
/// Rows `offsets[g]..offsets[g + 1]` use group g. Weights in blocks multiply integers: rows are coded in 8 bits with a scale
/// for every 32, sums within a block of the weight (16 or 32) are exact, and
/// `sum over blocks b of x_scale_b (scale_b (q . x)_b + min_b sum(x)_b)` runs in sixteen chains of f32; see [`tile`]. Every
/// level gives the same bits.
///
/// Numbers multiply as in [`matmul`](crate::gemm::matmul): bf16 as [`Compute::Bf16`], f32 and f16 as [`Compute::F32`].
///
/// # Panics
/// When shapes do not fit.
pub fn matmul_stored(cpu: &Cpu, a: Operand<'_>, offsets: &[u32], w: &StoredWeight, c: ViewMut<'_>) {
    let rises = offsets.windows(2).all(|w| w[0] <= w[1]);
    assert!(
        rises && offsets.first() == Some(&0) && offsets.last().map(|&x| x as usize) == Some(a.rows()),
        "matmul_stored: offsets {offsets:?} do not cover {} rows",
        a.rows()
    );
    assert_eq!((a.cols, offsets.len()), (w.cols, w.groups + 1), "matmul_stored: depth and groups");
    assert_eq!(c.len(), a.rows() * w.rows, "matmul_stored: output of {} x {}", a.rows(), w.rows);
    if a.rows() == 0 {
        return;
    }
    match w.multiplied() {
        Multiplied::Codes => panic!("matmul_stored: a weight in E4M3"),
        Multiplied::Blocks => product::matmul(cpu, a, offsets, w, c),
        Multiplied::Numbers(compute) => match w.packed() {
            Some(part) => {
                let rows: Vec<usize> = w.group(0).iter().map(|part| part.rows).collect();
                gemm::matmul_stacked(cpu, a, offsets, compute, &rows, &part, c);
            }
            None => gemm::matmul_unpacked(cpu, a, offsets, w.rows, compute, w, c),
        },
    }
}

/// `c[i] = a[i] W_g(i)ᵀ` like [`matmul_stored`], with a weight in E4M3: as [`matmul8`](gemm::matmul8) multiplies codes, by the
/// scales that it is stored with. A row of it with a code that is no number has no product that is one.
///
/// # Panics
/// When shapes do not fit, or the weight is in another form.
pub fn matmul8_stored(cpu: &Cpu, a: Values<'_>, how: Fp8, offsets: &[u32], w: &StoredWeight, c: ViewMut<'_>) {
    assert_eq!(w.multiplied(), Multiplied::Codes, "matmul8_stored: what is multiplied");
    assert_eq!((a.cols(), offsets.len()), (w.cols, w.groups + 1), "matmul8_stored: depth and groups");
    let rows: Vec<usize> = w.group(0).iter().map(|part| part.rows).collect();
    let laid = w.parts.iter().all(|part| part.laid.get().is_some());
    let (level, each) = (cpu.level(), w.parts_per_group());
    let part = |group: usize, i: usize| {
        let part = &w.parts[group * each + i];
        Right8::of_matrix(level, part.matrix8(), part.laid.get().map(Panels::bytes))
    };
    gemm::matmul8_stacked(cpu, a, how, offsets, &rows, &part, laid, c);
}
