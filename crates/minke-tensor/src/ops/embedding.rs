//! Rows of the embedding.

use minke_cpu::{DType, copy, embedding as kernel};
use std::sync::Arc;

use crate::context::{Context, Var};
use crate::store::WeightId;
use crate::tensor::Tensor;

/// Rows that are looked up in a file before its pages are let go: each may bring 2 MiB of them.
const LOOKED_UP: usize = 8;

/// `y[t] = scale W[ids[t]]`: W [w, d], y [n, d] in f32. Weights kept in bf16 are rounded first, as everywhere;
/// those that run from a file are its numbers.
///
/// # Panics
/// When an id is outside the vocabulary.
pub fn embedding(cx: &mut Context<'_>, w: WeightId, ids: &Arc<[u32]>, scale: Option<f32>) -> Var {
    let y = cx.timed("embedding", |cx| {
        let mut y = Tensor::uninit(ids.len(), cx.store.cols(w), cx.store.dtype(w));
        if let Some(stored) = cx.store.stored(w) {
            let mut rows = Tensor::uninit(ids.len(), stored.cols, DType::F32);
            for (rows, ids) in rows.f32_mut().chunks_mut(LOOKED_UP * stored.cols).zip(ids.chunks(LOOKED_UP)) {
                for (row, &id) in rows.chunks_mut(stored.cols).zip(ids) {
                    stored.numbers_into(0, id as usize, row);
                }
                stored.forget_rows();
            }
            return scale.map_or_else(|| rows.clone(), |scale| scaled(cx, &rows, scale));
        }
        kernel::gather(cx.cpu, minke_cpu::View::F32(cx.store.slice(w)), ids, y.view_mut());
        match scale {
            None => y.converted(cx.cpu, DType::F32),
            Some(scale) => scaled(cx, &y, scale),
        }
    });
    let y = cx.var(y);
    let (out, ids) = (y.slot(), ids.clone());
    cx.record(move |cx| {
        let Some(d_y) = cx.take_grad(out) else { return };
        cx.timed("embedding backward", |cx| {
            let d_y = scale.map_or_else(|| d_y.clone(), |scale| scaled(cx, &d_y, scale));
            kernel::scatter_add(cx.cpu, d_y.view(), &ids, cx.store.with_grad(w).1);
        });
    });
    y
}

/// `factor x` in f32.
fn scaled(cx: &Context<'_>, x: &Tensor, factor: f32) -> Tensor {
    let mut out = Tensor::uninit(x.rows(), x.cols(), DType::F32);
    copy::scale_into(cx.cpu, x.view(), factor, out.view_mut());
    out
}
