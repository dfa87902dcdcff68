//! Several samples in one batch, and which samples a step has.

use minke_cpu::attention::Segment;
use minke_model::{IGNORE, MtpTargets, TrainBatch};
use minke_num::rng;

use super::data::Sample;

/// Lays samples one behind the other, each a segment.
///
/// Row i of a sample of l tokens reads token i and is asked for token i + 1 if that is to be learned; its last token has
/// nothing to predict and no row, so a sample takes l - 1 rows. Module k of `mtp_depth` reads token i + k and is asked
/// for the one behind it, if it is to be learned.
pub fn pack<'a>(samples: impl IntoIterator<Item = &'a Sample>, mtp_depth: usize) -> TrainBatch {
    let mut batch = TrainBatch { mtp: vec![MtpTargets::default(); mtp_depth], ..TrainBatch::default() };
    for Sample { ids, mask } in samples {
        let len = ids.len().saturating_sub(1);
        let label = |at: usize| if mask.get(at) == Some(&true) { ids[at] } else { IGNORE };
        batch.segments.push(Segment { start: batch.tokens.len(), len });
        batch.tokens.extend(&ids[..len]);
        batch.positions.extend(0..len as u32);
        batch.labels.extend((0..len).map(|at| label(at + 1)));
        for (k, module) in (1..).zip(&mut batch.mtp) {
            module.tokens.extend((0..len).map(|at| ids.get(at + k).copied().unwrap_or(0)));
            module.labels.extend((0..len).map(|at| label(at + k + 1)));
        }
    }
    batch
}

/// Rows that a sample takes.
fn rows(sample: &Sample) -> usize {
    sample.ids.len().saturating_sub(1)
}

/// The ends of runs of `order` that fit into `capacity` rows, each as long as it can be.
fn ends(samples: &[Sample], order: &[u32], capacity: usize) -> Vec<usize> {
    let (mut ends, mut held) = (Vec::new(), 0);
    for (at, &sample) in order.iter().enumerate() {
        let more = rows(&samples[sample as usize]);
        if held > 0 && held + more > capacity {
            ends.push(at);
            held = 0;
        }
        held += more;
    }
    if !order.is_empty() {
        ends.push(order.len());
    }
    ends
}

/// All samples in their order, in batches of at most `capacity` rows.
pub fn in_order(samples: &[Sample], capacity: usize, mtp_depth: usize) -> Vec<TrainBatch> {
    let order: Vec<u32> = (0..samples.len() as u32).collect();
    let mut begin = 0;
    let batch = |end: usize| {
        let part = &samples[begin..end];
        begin = end;
        pack(part, mtp_depth)
    };
    ends(samples, &order, capacity).into_iter().map(batch).collect()
}

/// The batches of one step.
#[derive(Debug, Clone)]
pub struct StepBatches {
    /// Micro-batches whose gradients add up.
    pub micro: Vec<TrainBatch>,
    /// The samples of each, by their numbers.
    pub samples: Vec<Vec<u32>>,
    /// Epochs done when the step is.
    pub epoch: f64,
}

/// The batches of every step: a function of seed and step.
///
/// Every epoch visits each sample once, in an order of its own, and cuts it into batches; how many depends on the order.
#[derive(Debug)]
pub struct Batches {
    samples: Vec<Sample>,
    capacity: usize,
    accumulation: usize,
    mtp_depth: usize,
    seed: u64,
    /// The first step of each epoch, as far as is known; one more than the epochs known.
    begins: Vec<u64>,
    /// The epoch that was asked for last.
    current: Option<Epoch>,
}

#[derive(Debug)]
struct Epoch {
    number: u64,
    order: Vec<u32>,
    ends: Vec<usize>,
}

impl Batches {
    /// Batches of at most `capacity` rows, `accumulation` of them to a step.
    ///
    /// # Panics
    /// When there are no samples.
    pub fn new(
        samples: Vec<Sample>,
        capacity: usize,
        accumulation: usize,
        mtp_depth: usize,
        seed: u64,
    ) -> Self {
        assert!(!samples.is_empty(), "batches of no samples");
        let accumulation = accumulation.max(1);
        Self { samples, capacity, accumulation, mtp_depth, seed, begins: vec![0], current: None }
    }

    /// What is learned from.
    pub fn samples(&self) -> &[Sample] {
        &self.samples
    }

    /// Samples of an epoch.
    pub fn len(&self) -> usize {
        self.samples.len()
    }

    /// Whether there are none, which cannot be.
    pub fn is_empty(&self) -> bool {
        self.samples.is_empty()
    }

    /// Steps of the first `epochs` epochs.
    pub fn steps_of(&mut self, epochs: u64) -> u64 {
        while (self.begins.len() as u64) <= epochs {
            self.learn_next();
        }
        self.begins[epochs as usize]
    }

    /// The batches of step `step`, from 0.
    pub fn step(&mut self, step: u64) -> StepBatches {
        while self.begins.last().is_some_and(|&known| known <= step) {
            self.learn_next();
        }
        let number = self.begins.partition_point(|&begin| begin <= step) as u64 - 1;
        let first = (step - self.begins[number as usize]) as usize * self.accumulation;
        if self.current.as_ref().is_none_or(|epoch| epoch.number != number) {
            self.current = Some(self.epoch(number));
        }
        let Epoch { order, ends, .. } = self.current.as_ref().expect("it was made above");
        let last = (first + self.accumulation).min(ends.len());
        let samples = (first..last).map(|at| {
            let begin = if at == 0 { 0 } else { ends[at - 1] };
            order[begin..ends[at]].to_vec()
        });
        let samples: Vec<Vec<u32>> = samples.collect();
        let packed =
            |part: &Vec<u32>| pack(part.iter().map(|&sample| &self.samples[sample as usize]), self.mtp_depth);
        let done = ends[last - 1] as f64 / order.len() as f64;
        StepBatches { micro: samples.iter().map(packed).collect(), samples, epoch: number as f64 + done }
    }

    fn learn_next(&mut self) {
        let number = self.begins.len() as u64 - 1;
        let epoch = self.epoch(number);
        let steps = epoch.ends.len().div_ceil(self.accumulation) as u64;
        let begin = self.begins[number as usize];
        self.begins.push(begin + steps);
        self.current = Some(epoch);
    }

    fn epoch(&self, number: u64) -> Epoch {
        let mut order: Vec<u32> = (0..self.samples.len() as u32).collect();
        // Fisher and Yates, drawn by place
        for at in (1..order.len()).rev() {
            let other = rng::below(self.seed ^ 0x7366_7400, number, at as u64, at as u64 + 1);
            order.swap(at, other as usize);
        }
        let ends = ends(&self.samples, &order, self.capacity);
        Epoch { number, order, ends }
    }
}
