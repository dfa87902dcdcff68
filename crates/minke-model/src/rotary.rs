//! The rotations of a pass, by kind of layer.

use std::sync::Arc;

use minke_cpu::rope;
use minke_tensor::ops::Rotary;

use crate::config::Rope;

/// Cosines and sines, for as many positions as were asked for so far.
pub(crate) struct Tables {
    inv_freq: Vec<f32>,
    scale: f32,
    interleaved: bool,
    positions: usize,
    cos: Arc<[f32]>,
    sin: Arc<[f32]>,
}

impl Tables {
    pub fn new(rope: &Rope, width: usize) -> Self {
        Self {
            inv_freq: rope.inv_freq(width),
            scale: rope.cos_sin_scale(),
            interleaved: rope.interleaved,
            positions: 0,
            cos: Arc::new([]),
            sin: Arc::new([]),
        }
    }

    /// The rotation of rows at `positions`.
    pub fn rotary(&mut self, positions: Arc<[u32]>) -> Rotary {
        let needed = positions.iter().map(|&p| p as usize + 1).max().unwrap_or(0);
        if needed > self.positions {
            self.positions = needed.next_power_of_two();
            let (cos, sin) = rope::cos_sin(&self.inv_freq, self.positions, self.scale);
            (self.cos, self.sin) = (cos.into(), sin.into());
        }
        Rotary { cos: self.cos.clone(), sin: self.sin.clone(), positions, interleaved: self.interleaved }
    }
}

/// The rotations of a pass.
#[derive(Clone)]
pub(crate) struct Rotaries {
    pub full: Rotary,
    /// Of layers that slide, where it is another.
    pub sliding: Option<Rotary>,
}
