//! Rows of the embedding.

use minke_cpu::{DType, embedding as kernel};
use std::sync::Arc;

use crate::context::{Context, Var};
use crate::store::WeightId;
use crate::tensor::Tensor;

/// `y[t] = W[ids[t]]`: W [w, d], y [n, d] in f32. Weights kept in bf16 are rounded first, as everywhere;
/// those that run from a file are its numbers.
///
/// # Panics
/// When an id is outside the vocabulary.
pub fn embedding(cx: &mut Context<'_>, w: WeightId, ids: &Arc<[u32]>) -> Var {
    let y = cx.timed("embedding", |cx| {
        let mut y = Tensor::uninit(ids.len(), cx.store.cols(w), cx.store.dtype(w));
        if let Some(stored) = cx.store.stored(w) {
            let mut rows = Tensor::uninit(ids.len(), stored.cols, DType::F32);
            for (row, &id) in rows.f32_mut().chunks_mut(stored.cols).zip(ids.iter()) {
                stored.numbers_into(0, id as usize, row);
            }
            return rows;
        }
        kernel::gather(cx.cpu, minke_cpu::View::F32(cx.store.slice(w)), ids, y.view_mut());
        y.converted(cx.cpu, DType::F32)
    });
    let y = cx.var(y);
    let (out, ids) = (y.slot(), ids.clone());
    cx.record(move |cx| {
        let Some(d_y) = cx.take_grad(out) else { return };
        cx.timed("embedding backward", |cx| {
            kernel::scatter_add(cx.cpu, d_y.view(), &ids, cx.store.with_grad(w).1);
        });
    });
    y
}
