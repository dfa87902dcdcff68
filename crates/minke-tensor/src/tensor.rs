//! A matrix and where its memory comes from.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use minke_cpu::arena::{self, Piece};
use minke_cpu::fp8::{self, Codes, CodesMut, Cuts, Fp8};
use minke_cpu::{Cpu, DType, View, ViewMut};
use minke_num::bf16;

/// Bytes of the buffers of tensors, over all models of the process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    /// In use.
    pub live_bytes: usize,
    /// At most, since [`Memory::reset`].
    pub peak_bytes: usize,
    /// At most when a backward pass began: what the operations of a pass keep for it.
    pub kept_bytes: usize,
    /// In use, or waiting to be used again.
    pub held_bytes: usize,
}

static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);
static KEPT: AtomicUsize = AtomicUsize::new(0);

impl Memory {
    /// As it is.
    pub fn now() -> Self {
        let [live_bytes, peak_bytes, kept_bytes] =
            [&LIVE, &PEAK, &KEPT].map(|counter| counter.load(Ordering::Relaxed));
        Self { live_bytes, peak_bytes, kept_bytes, held_bytes: arena::held_bytes() }
    }

    /// Forgets what was before.
    pub fn reset() {
        PEAK.store(LIVE.load(Ordering::Relaxed), Ordering::Relaxed);
        KEPT.store(0, Ordering::Relaxed);
    }

    /// A backward pass begins; of what is in use, so many bytes are gradients of weights.
    pub(crate) fn turns_back(gradients: usize) {
        KEPT.fetch_max(LIVE.load(Ordering::Relaxed).saturating_sub(gradients), Ordering::Relaxed);
    }
}

/// A buffer; memory comes back to tensors when it is dropped.
struct Storage(Piece);

impl Storage {
    fn new(bytes: usize) -> Self {
        let piece = Piece::new(bytes);
        let live = LIVE.fetch_add(piece.bytes(), Ordering::Relaxed) + piece.bytes();
        PEAK.fetch_max(live, Ordering::Relaxed);
        Self(piece)
    }
}

impl Drop for Storage {
    fn drop(&mut self) {
        LIVE.fetch_sub(self.0.bytes(), Ordering::Relaxed);
    }
}

/// A row-major matrix in FP8: a code per element, a scale per block of a row. Clones share the memory.
#[derive(Clone)]
pub struct Tensor8 {
    codes: Arc<Storage>,
    scales: Tensor,
    cuts: Cuts,
}

impl Tensor8 {
    /// The codes of `x`, whose rows are cut into blocks as `cuts` says; see [`fp8::quantize`].
    ///
    /// # Panics
    /// When `cuts` is of another length than rows.
    pub fn quantize(cpu: &Cpu, x: &Tensor, cuts: Cuts, how: Fp8) -> Self {
        let make = |to: CodesMut<'_>| fp8::quantize(cpu, x.view(), cuts, how, to.codes, to.scales);
        Self::made(x.rows, cuts, how, make).0
    }

    /// Codes that are yet to be made, and where they go.
    pub fn made<T>(rows: usize, cuts: Cuts, how: Fp8, make: impl FnOnce(CodesMut<'_>) -> T) -> (Self, T) {
        let mut codes = Storage::new(rows * cuts.len);
        let mut scales = Tensor::uninit(rows, cuts.blocks(), DType::F32);
        let to = CodesMut { codes: codes.0.get(rows * cuts.len), scales: scales.f32_mut(), cuts, how };
        let made = make(to);
        (Self { codes: Arc::new(codes), scales, cuts }, made)
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.scales.rows
    }

    /// How rows are cut.
    pub fn cuts(&self) -> Cuts {
        self.cuts
    }

    /// What products read; rows through `index` if there is one.
    pub fn codes<'a>(&'a self, index: Option<&'a [u32]>) -> Codes<'a> {
        let codes = self.codes.0.view(self.rows() * self.cuts.len);
        Codes { codes, scales: self.scales.f32(), cuts: self.cuts, index }
    }

    /// The numbers that it stands for, rounded to `dtype`.
    pub fn numbers(&self, cpu: &Cpu, dtype: DType) -> Tensor {
        let mut out = Tensor::uninit(self.rows(), self.cuts.len, dtype);
        fp8::dequantize(cpu, self.codes(None), out.view_mut());
        out
    }
}

/// A row-major matrix [rows, cols]. Clones share the memory; only a tensor that is not shared can be written.
#[derive(Clone)]
pub struct Tensor {
    storage: Arc<Storage>,
    rows: usize,
    cols: usize,
    dtype: DType,
}

impl Tensor {
    /// A matrix with unspecified contents, to be written in full.
    ///
    /// # Panics
    /// When the size overflows.
    pub fn uninit(rows: usize, cols: usize, dtype: DType) -> Self {
        let bytes = rows.checked_mul(cols).and_then(|n| n.checked_mul(dtype.size_bytes()));
        let storage = Arc::new(Storage::new(bytes.expect("a tensor's size fits usize")));
        Self { storage, rows, cols, dtype }
    }

    /// A matrix of zeros.
    pub fn zeros(rows: usize, cols: usize, dtype: DType) -> Self {
        let mut t = Self::uninit(rows, cols, dtype);
        match t.view_mut() {
            ViewMut::F32(x) => x.fill(0.0),
            ViewMut::Bf16(x) => x.fill(bf16::ZERO),
        }
        t
    }

    /// A copy of `data` as an f32 matrix.
    ///
    /// # Panics
    /// When the length is not `rows * cols`.
    pub fn from_f32(rows: usize, cols: usize, data: &[f32]) -> Self {
        let mut t = Self::uninit(rows, cols, DType::F32);
        t.f32_mut().copy_from_slice(data);
        t
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Row length.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The storage format.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// The elements.
    pub fn view(&self) -> View<'_> {
        let n = self.rows * self.cols;
        match self.dtype {
            DType::F32 => View::F32(self.storage.0.view(n)),
            DType::Bf16 => View::Bf16(self.storage.0.view(n)),
        }
    }

    /// The elements, to be written.
    ///
    /// # Panics
    /// When the memory is shared with another tensor.
    pub fn view_mut(&mut self) -> ViewMut<'_> {
        let n = self.rows * self.cols;
        let storage = Arc::get_mut(&mut self.storage).expect("a tensor that is written is not shared");
        match self.dtype {
            DType::F32 => ViewMut::F32(storage.0.get(n)),
            DType::Bf16 => ViewMut::Bf16(storage.0.get(n)),
        }
    }

    /// The elements of an f32 matrix.
    ///
    /// # Panics
    /// When it is not f32.
    pub fn f32(&self) -> &[f32] {
        match self.view() {
            View::F32(x) => x,
            View::Bf16(_) => panic!("expected an f32 tensor, got bf16"),
        }
    }

    /// The elements of an f32 matrix, to be written.
    ///
    /// # Panics
    /// When it is not f32 or shared.
    pub fn f32_mut(&mut self) -> &mut [f32] {
        match self.view_mut() {
            ViewMut::F32(x) => x,
            ViewMut::Bf16(_) => panic!("expected an f32 tensor, got bf16"),
        }
    }

    /// Whether both are the same memory.
    pub fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.storage, &other.storage)
    }

    /// Bytes that it takes.
    pub(crate) fn bytes(&self) -> usize {
        self.storage.0.bytes()
    }

    /// All elements widened to f32.
    pub fn to_vec(&self) -> Vec<f32> {
        match self.view() {
            View::F32(x) => x.to_vec(),
            View::Bf16(x) => x.iter().map(|x| x.to_f32()).collect(),
        }
    }

    /// The same elements in `dtype`: itself when it has it already.
    pub fn converted(&self, cpu: &minke_cpu::Cpu, dtype: DType) -> Self {
        if self.dtype == dtype {
            return self.clone();
        }
        let mut out = Self::uninit(self.rows, self.cols, dtype);
        minke_cpu::copy::convert(cpu, self.view(), out.view_mut());
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeros_are_zero_in_recycled_memory_too() {
        for _ in 0..8 {
            let used = Tensor::from_f32(3, 5, &[1.0; 15]);
            assert_eq!(used.f32(), &[1.0; 15]);
            drop(used);
            assert_eq!(Tensor::zeros(3, 5, DType::F32).f32(), &[0.0; 15]);
        }
        assert!(Tensor::zeros(0, 7, DType::Bf16).view().is_empty());
    }

    #[test]
    #[should_panic(expected = "not shared")]
    fn a_shared_tensor_cannot_be_written() {
        let mut a = Tensor::zeros(2, 2, DType::F32);
        let _b = a.clone();
        a.f32_mut()[0] = 1.0;
    }
}
