//! What linear layers read, summed up by column: where an error of a weight matters, and where it does not. Keys of latent
//! attention are read by queries, too.

use crate::store::WeightId;

/// Sums over all rows that products with one weight have read.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct InputSums {
    /// Rows read by each group: tokens, or those that came to an expert.
    pub rows: Vec<u64>,
    /// Sum of squares of each column, group by group.
    pub squares: Vec<f64>,
}

impl InputSums {
    /// The mean square of every column over the rows of all groups; `None` where none has read anything.
    pub fn mean_square_of_all(&self) -> Option<Vec<f32>> {
        let rows = self.rows.iter().sum::<u64>();
        let cols = self.squares.len() / self.rows.len().max(1);
        let sum = |col: usize| self.squares.iter().skip(col).step_by(cols).sum::<f64>();
        (rows > 0).then(|| (0..cols).map(|col| (sum(col) / rows as f64) as f32).collect())
    }

    /// The mean square of every column of a group; `None` where it has read nothing.
    pub fn mean_squares(&self, group: usize) -> Option<Vec<f32>> {
        let rows = *self.rows.get(group).filter(|rows| **rows > 0)? as f64;
        let cols = self.squares.len() / self.rows.len();
        Some(self.squares[group * cols..][..cols].iter().map(|sum| (sum / rows) as f32).collect())
    }

    /// Adds the first `cols` numbers of rows of `x` [n, width]: through `index` if there is one, rows
    /// `offsets[g]..offsets[g + 1]` to group g. In the order of rows, so that no number of threads shows.
    fn add(&mut self, x: &[f32], [width, cols]: [usize; 2], index: Option<&[u32]>, offsets: &[u32]) {
        let groups = offsets.len() - 1;
        self.rows.resize(groups, 0);
        self.squares.resize(groups * cols, 0.0);
        for (group, ends) in offsets.windows(2).enumerate() {
            let sums = &mut self.squares[group * cols..][..cols];
            for row in ends[0]..ends[1] {
                let row = index.map_or(row, |index| index[row as usize]) as usize;
                for (sum, x) in sums.iter_mut().zip(&x[row * width..][..cols]) {
                    *sum += f64::from(*x) * f64::from(*x);
                }
            }
            self.rows[group] += u64::from(ends[1] - ends[0]);
        }
    }
}

/// The sums of all weights of a store.
#[derive(Clone, Debug, Default)]
pub(crate) struct Inputs {
    weights: Vec<InputSums>,
    /// Of queries, by the weight whose keys they are multiplied with: a group is a head.
    queries: Vec<InputSums>,
}

/// Those of a weight, which may be the first of it.
fn sums(all: &mut Vec<InputSums>, id: WeightId) -> &mut InputSums {
    if all.len() <= id.index() {
        all.resize(id.index() + 1, InputSums::default());
    }
    &mut all[id.index()]
}

/// Those of a weight that something was seen of.
fn seen(all: &[InputSums], id: WeightId) -> Option<&InputSums> {
    all.get(id.index()).filter(|sums| !sums.rows.is_empty())
}

impl Inputs {
    pub(crate) fn of(&self, id: WeightId) -> Option<&InputSums> {
        seen(&self.weights, id)
    }

    pub(crate) fn of_queries(&self, id: WeightId) -> Option<&InputSums> {
        seen(&self.queries, id)
    }

    /// Adds rows of `x` [n, cols]: through `index` if there is one, rows `offsets[g]..offsets[g + 1]` to group g.
    pub(crate) fn add(
        &mut self,
        id: WeightId,
        x: &[f32],
        cols: usize,
        index: Option<&[u32]>,
        offsets: &[u32],
    ) {
        sums(&mut self.weights, id).add(x, [cols; 2], index, offsets);
    }

    /// Adds the first `nope` numbers of each head of queries [n, heads, width].
    pub(crate) fn add_queries(&mut self, id: WeightId, q: &[f32], [heads, width, nope]: [usize; 3]) {
        let n = q.len() / (heads * width);
        let of_heads: Vec<u32> =
            (0..heads).flat_map(|head| (0..n).map(move |row| (row * heads + head) as u32)).collect();
        let offsets: Vec<u32> = (0..=heads).map(|head| (head * n) as u32).collect();
        sums(&mut self.queries, id).add(q, [width, nope], Some(&of_heads), &offsets);
    }
}

#[cfg(test)]
mod tests {
    use minke_cpu::attention::{AttentionShape, KvCache};
    use minke_cpu::swiglu::Gate;
    use minke_cpu::{Cpu, DType};

    use super::*;
    use crate::{Context, Store, Tensor, ops};

    #[test]
    fn sums_are_of_rows_that_were_read() {
        let cpu = Cpu::detect(2);
        for dtype in [DType::F32, DType::Bf16] {
            let mut store = Store::default();
            let ids = [store.add(1, 2, 3, dtype), store.add(1, 4, 3, dtype), store.add(1, 3, 2, dtype)];
            store.data.fill(1.0);
            let x = [1.0, -2.0, 0.5, 3.0, 0.0, -1.0];
            let read = |store: &mut Store| {
                let mut cx = Context::inference(&cpu, store);
                let mut tensor = Tensor::uninit(2, 3, DType::F32);
                tensor.f32_mut().copy_from_slice(&x);
                let x = cx.var(tensor.converted(&cpu, dtype));
                ops::linear(&mut cx, &x, ids[0], DType::F32);
                ops::swiglu_ffn(&mut cx, &x, Gate::Silu, ids[1], ids[2], DType::F32);
            };
            read(&mut store);
            assert_eq!(store.inputs(ids[0]), None);
            store.watch_inputs(true);
            read(&mut store);
            read(&mut store);
            let expected = InputSums { rows: vec![4], squares: vec![20.0, 8.0, 2.5] };
            assert_eq!(store.inputs(ids[0]), Some(&expected));
            assert_eq!(store.inputs(ids[1]), Some(&expected));
            assert_eq!(expected.mean_squares(0), Some(vec![5.0, 2.0, 0.625]));
            let hidden = store.inputs(ids[2]).unwrap();
            assert_eq!((hidden.rows[0], hidden.squares.len()), (4, 2));
            assert!(hidden.squares[0] > 0.0 && hidden.squares[0] == hidden.squares[1]);
            store.watch_inputs(true);
            assert_eq!(store.inputs(ids[0]), None);
        }
    }

    /// Both forms of latent attention note their queries, without what is rotated of them.
    #[test]
    fn queries_are_summed_up_by_head() {
        let (heads, nope, r, v, c, n) = (2, 3, 2, 4, 5, 7);
        let width = nope + r;
        let cpu = Cpu::detect(2);
        let q: Vec<f32> = (0..n * heads * width).map(|i| (i % 11) as f32 - 5.0).collect();
        let mut squares = vec![0.0; heads * nope];
        for row in q.chunks(heads * width) {
            for (head, q) in row.chunks(width).enumerate() {
                for (at, q) in q[..nope].iter().enumerate() {
                    squares[head * nope + at] += f64::from(q * q);
                }
            }
        }
        let expected = InputSums { rows: vec![n as u64; heads], squares };
        let shape = AttentionShape {
            heads,
            kv_heads: heads,
            qk_dim: width,
            v_dim: v,
            scale: 1.0,
            window: None,
            softcap: None,
        };
        let latents = AttentionShape { kv_heads: 1, qk_dim: c + r, v_dim: c, ..shape };
        let tensor = |cols: usize, x: &[f32], dtype| {
            let mut tensor = Tensor::uninit(n, cols, DType::F32);
            tensor.f32_mut().copy_from_slice(x);
            tensor.converted(&cpu, dtype)
        };
        for (dtype, absorbed) in
            [(DType::F32, false), (DType::F32, true), (DType::Bf16, false), (DType::Bf16, true)]
        {
            let mut store = Store::default();
            let (kv_a_norm, kv_b) =
                (store.add(1, 1, c, DType::F32), store.add(1, heads * (nope + v), c, dtype));
            store.data.fill(1.0);
            let attend = |store: &mut Store| {
                let mut cx = Context::inference(&cpu, store);
                let (q, kv_a) =
                    (tensor(heads * width, &q, dtype), tensor(c + r, &vec![1.0; n * (c + r)], dtype));
                let w = ops::MlaWeights { kv_a_norm, kv_b, eps: 1e-6 };
                let a = ops::AttentionWeights { shape, rotary: r };
                let rotary = ops::Rotary {
                    cos: vec![0.6; n].into(),
                    sin: vec![0.8; n].into(),
                    positions: (0..n as u32).collect(),
                    interleaved: true,
                };
                if absorbed {
                    let mut cache = KvCache::of_latents(&latents, dtype);
                    ops::mla_absorbed(&mut cx, &q, &kv_a, w, a, &rotary, vec![(0, n, &mut cache)]);
                } else {
                    let mut cache = KvCache::new(&shape, dtype);
                    let (q, kv_a) = (cx.var(q), cx.var(kv_a));
                    let keys = ops::Keys::Caches(vec![(0, n, &mut cache)]);
                    ops::mla_attention(&mut cx, &q, &kv_a, w, a, &rotary, keys);
                }
            };
            attend(&mut store);
            assert_eq!(store.queries(kv_b), None);
            store.watch_inputs(true);
            attend(&mut store);
            assert_eq!(store.queries(kv_b), Some(&expected), "{dtype:?}, absorbed: {absorbed}");
            assert_eq!(store.queries(kv_a_norm), None);
        }
    }

    #[test]
    fn groups_have_their_own() {
        let mut store = Store::default();
        let id = store.add(3, 1, 2, DType::F32);
        let mut inputs = Inputs::default();
        // rows 2 and 0 to the first group, none to the second, row 1 to the third
        inputs.add(id, &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], 2, Some(&[2, 0, 1]), &[0, 2, 2, 3]);
        let sums = inputs.of(id).unwrap();
        assert_eq!(sums.rows, [2, 0, 1]);
        assert_eq!(sums.mean_squares(0), Some(vec![13.0, 20.0]));
        assert_eq!(sums.mean_squares(1), None);
        assert_eq!(sums.mean_squares(2), Some(vec![9.0, 16.0]));
        assert_eq!(sums.mean_squares(3), None);
        assert_eq!(sums.mean_square_of_all(), Some(vec![35.0 / 3.0, 56.0 / 3.0]));
    }
}
