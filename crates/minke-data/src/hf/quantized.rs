//! Weights in FP8, as DeepSeek publishes them.
//!
//! A matrix `X.weight` [n, k] of E4M3 codes has a matrix `X.weight_scale_inv` beside it, one scale for each square of
//! 128 by 128, the last ones cut short: `w = code * scale`. The scales are stored in F32, BF16 or `F8_E8M0`. What else
//! the folder holds is stored as usual. Nothing of this is believed: a weight without scales, scales without a
//! weight, another shape, and codes or scales that are no numbers are errors that name the tensor.

use minke_num::fp8::{self, Quantized, scale_shape};

use super::WeightFiles;
use super::header::Dtype;
use crate::{Error, Result};

/// What the name of a weight's scales has behind the weight's own.
const SCALES: &str = "_scale_inv";

/// Codes that are looked through at a time.
const PIECE: usize = 4096;

/// The name of the scales of a weight.
pub fn scales_name(weight: &str) -> String {
    format!("{weight}{SCALES}")
}

/// The weight whose scales have this name, if it is a name of scales.
pub fn weight_of_scales(name: &str) -> Option<&str> {
    name.strip_suffix(SCALES)
}

/// A matrix in E4M3 as it lies in its file, and its scales.
#[derive(Debug, Clone)]
pub struct QuantizedView<'a> {
    /// Codes [rows, cols]; none is NaN.
    pub codes: &'a [u8],
    /// Scales, `fp8::scale_shape(rows, cols)` of them, finite and positive.
    pub scales: Vec<f32>,
    /// Rows (outputs).
    pub rows: usize,
    /// Columns (inputs).
    pub cols: usize,
}

impl QuantizedView<'_> {
    /// A copy of its own.
    pub fn to_owned(&self) -> Quantized {
        Quantized {
            codes: self.codes.to_vec(),
            scales: self.scales.clone(),
            rows: self.rows,
            cols: self.cols,
        }
    }

    /// Its numbers, `code * scale` in f32; see [`fp8::dequantize`].
    ///
    /// # Panics
    /// When `out` has another length.
    pub fn dequantize(&self, out: &mut [f32]) {
        fp8::dequantize(self.codes, &self.scales, self.cols, out);
    }
}

impl WeightFiles {
    /// Whether a tensor is stored in E4M3 codes.
    pub fn is_quantized(&self, name: &str) -> bool {
        self.get(name).is_some_and(|view| view.dtype == Dtype::F8E4M3)
    }

    /// Whether a tensor is the scales of another.
    pub fn is_scales(&self, name: &str) -> bool {
        weight_of_scales(name).is_some_and(|weight| self.is_quantized(weight))
    }

    /// Checks that every weight in FP8 has its scales and that all scales have a weight in FP8. Codes are not looked
    /// at, since that takes reading all of the file.
    ///
    /// # Errors
    /// What is wrong, with the tensor's name.
    pub fn check_quantized(&self) -> Result<()> {
        for name in self.names() {
            if self.is_quantized(name) {
                self.coded(name)?;
            } else if let Some(weight) = weight_of_scales(name)
                && !self.is_quantized(weight)
            {
                let got = self.get(weight).map_or("no such tensor", |view| view.dtype.name());
                return Err(self.broken(name, format!("its weight `{weight}` in F8_E4M3"), got));
            }
        }
        Ok(())
    }

    /// A tensor in FP8 with its scales, checked.
    ///
    /// # Errors
    /// There is no such tensor, it has no E4M3 codes or not two axes, its scales are missing or of another dtype or
    /// shape, or a scale or code is no number.
    pub fn quantized_view(&self, name: &str) -> Result<QuantizedView<'_>> {
        let (codes, scales, [rows, cols]) = self.coded(name)?;
        self.check_codes(name)?;
        Ok(QuantizedView { codes, scales, rows, cols })
    }

    /// Looks through the codes of a tensor in FP8.
    ///
    /// # Errors
    /// One is no number.
    pub fn check_codes(&self, name: &str) -> Result<()> {
        let Some(view) = self.get(name) else { return Ok(()) };
        let is_none = |code: &u8| code & 0x7f == 0x7f;
        // (a piece is gone through in vectors)
        let any = |piece: &[u8]| piece.iter().fold(false, |any, code| any | is_none(code));
        let Some(piece) = view.bytes.chunks(PIECE).position(any) else { return Ok(()) };
        let from = piece * PIECE;
        let at = from + view.bytes[from..].iter().position(is_none).expect("the piece has one");
        let cols = view.shape.last().copied().unwrap_or(1);
        let got = format!("NaN (code {:#04x}) at [{}, {}]", view.bytes[at], at / cols, at % cols);
        Err(self.broken(name, "numbers", got))
    }

    /// A copy of a tensor in FP8 with its scales.
    ///
    /// # Errors
    /// As [`WeightFiles::quantized_view`].
    pub fn quantized(&self, name: &str) -> Result<Quantized> {
        Ok(self.quantized_view(name)?.to_owned())
    }

    /// The scales of a tensor in FP8, checked; its codes are not looked at.
    ///
    /// # Errors
    /// As [`WeightFiles::quantized_view`], but for codes.
    pub fn scales(&self, name: &str) -> Result<Vec<f32>> {
        Ok(self.coded(name)?.1)
    }

    /// The codes of a tensor, its scales, and its shape.
    fn coded(&self, name: &str) -> Result<(&[u8], Vec<f32>, [usize; 2])> {
        let codes = self.get(name).ok_or_else(|| self.broken(name, "this tensor", "no such tensor"))?;
        if codes.dtype != Dtype::F8E4M3 {
            return Err(self.broken(name, "F8_E4M3", codes.dtype.name()));
        }
        let &[rows, cols] = codes.shape else {
            return Err(self.broken(name, "two axes for F8_E4M3", format!("shape {:?}", codes.shape)));
        };
        let beside = scales_name(name);
        let shape = scale_shape(rows, cols);
        let Some(view) = self.get(&beside) else {
            let expected = format!("its scales `{beside}` of shape {shape:?}");
            return Err(self.broken(name, expected, "no such tensor"));
        };
        if view.shape != shape {
            let expected = format!("shape {shape:?} for the squares of 128 of a weight [{rows}, {cols}]");
            return Err(self.broken(&beside, expected, format!("{:?}", view.shape)));
        }
        let scales: Vec<f32> = match view.dtype {
            Dtype::F8E8M0 => view.bytes.iter().map(|&code| fp8::e8m0_to_f32(code)).collect(),
            Dtype::F32 | Dtype::BF16 => self.read_f32(&beside)?,
            other => return Err(self.broken(&beside, "F32, BF16 or F8_E8M0", other.name())),
        };
        if let Some(at) = scales.iter().position(|scale| !(scale.is_finite() && *scale > 0.0)) {
            let got = format!("{} at [{}, {}]", scales[at], at / shape[1], at % shape[1]);
            return Err(self.broken(&beside, "scales that are finite and positive", got));
        }
        Ok((codes.bytes, scales, [rows, cols]))
    }

    fn broken(&self, name: &str, expected: impl Into<String>, got: impl Into<String>) -> Error {
        Error::weights(self.place(name), Some(name), expected, got)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use minke_num::bf16;

    use super::*;
    use crate::hf::{TensorSpec, write_safetensors};

    type Tensor<'a> = (&'a str, Dtype, &'a [usize], Vec<u8>);

    fn open(folder: &Path, tensors: &[Tensor]) -> WeightFiles {
        let specs: Vec<(TensorSpec, &[u8])> = tensors
            .iter()
            .map(|(name, dtype, shape, bytes)| {
                (TensorSpec { name: (*name).into(), dtype: *dtype, shape: shape.to_vec() }, bytes.as_slice())
            })
            .collect();
        write_safetensors(folder.join("model.safetensors"), &specs).unwrap();
        WeightFiles::open(folder).unwrap()
    }

    fn floats(scales: &[f32]) -> Vec<u8> {
        scales.iter().flat_map(|scale| scale.to_le_bytes()).collect()
    }

    #[test]
    fn scales_of_three_kinds_are_read() {
        let folder = tempfile::tempdir().unwrap();
        let codes: Vec<u8> = (0..130 * 129).map(|i| (i % 0x7f) as u8).collect();
        let scales = [0.5f32, 2.0, 0.25, 2f32.powi(-40)];
        let brain: Vec<u8> = scales.iter().flat_map(|&s| bf16::from_f32(s).to_le_bytes()).collect();
        let exponents = vec![126, 128, 125, 87];
        let kinds = [(Dtype::F32, floats(&scales)), (Dtype::BF16, brain), (Dtype::F8E8M0, exponents)];
        for (dtype, bytes) in kinds {
            let weights = open(
                folder.path(),
                &[
                    ("a.weight", Dtype::F8E4M3, &[130, 129], codes.clone()),
                    ("a.weight_scale_inv", dtype, &[2, 2], bytes),
                    ("norm.weight", Dtype::F32, &[1], floats(&[1.0])),
                ],
            );
            weights.check_quantized().unwrap();
            assert!(weights.is_quantized("a.weight") && weights.is_scales("a.weight_scale_inv"));
            assert!(!weights.is_scales("norm.weight") && !weights.is_quantized("norm.weight"));
            let q = weights.quantized("a.weight").unwrap();
            assert_eq!((&q.codes, &q.scales[..], q.rows, q.cols), (&codes, &scales[..], 130, 129));
            let got = weights.read_f32("a.weight").unwrap();
            assert_eq!(got, q.dequantize());
            let at = |row: usize, col: usize| (row * 129 + col, row / 128 * 2 + col / 128);
            for (index, scale) in [at(0, 0), at(127, 128), at(128, 127), at(129, 128)] {
                assert_eq!(got[index], fp8::e4m3_to_f32(codes[index]) * scales[scale], "{dtype}");
            }
        }
    }

    #[test]
    fn what_is_no_fp8_is_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let scales = |dtype, shape: &'static [usize], bytes| ("a.weight_scale_inv", dtype, shape, bytes);
        let one = || floats(&[1.0, 1.0]);
        let codes = vec![0x38; 2 * 129];
        let cases: Vec<(Option<Tensor>, &str)> = vec![
            (
                None,
                "`a.weight`: expected its scales `a.weight_scale_inv` of shape [1, 2], got no such tensor",
            ),
            (
                Some(scales(Dtype::F32, &[2, 1], one())),
                "`a.weight_scale_inv`: expected shape [1, 2] for the squares of 128 of a weight [2, 129], got [2, 1]",
            ),
            (Some(scales(Dtype::F32, &[2], one())), "`a.weight_scale_inv`: expected shape [1, 2]"),
            (Some(scales(Dtype::F16, &[1, 2], vec![0; 4])), "expected F32, BF16 or F8_E8M0, got F16"),
            (
                Some(scales(Dtype::F32, &[1, 2], floats(&[1.0, f32::NAN]))),
                "finite and positive, got NaN at [0, 1]",
            ),
            (Some(scales(Dtype::F32, &[1, 2], floats(&[f32::INFINITY, 1.0]))), "got inf at [0, 0]"),
            (Some(scales(Dtype::F32, &[1, 2], floats(&[1.0, 0.0]))), "got 0 at [0, 1]"),
            (Some(scales(Dtype::F32, &[1, 2], floats(&[-2.0, 1.0]))), "got -2 at [0, 0]"),
            (Some(scales(Dtype::F8E8M0, &[1, 2], vec![127, 255])), "got NaN at [0, 1]"),
        ];
        for (beside, expected) in cases {
            let mut tensors = vec![("a.weight", Dtype::F8E4M3, &[2, 129][..], codes.clone())];
            tensors.extend(beside);
            let weights = open(folder.path(), &tensors);
            for error in [
                weights.check_quantized().unwrap_err(),
                weights.quantized("a.weight").unwrap_err(),
                weights.read_f32("a.weight").unwrap_err(),
            ] {
                let text = error.to_string();
                assert!(error.is_user_error() && text.contains(expected), "{expected}: {text}");
                assert!(text.contains("model.safetensors, tensor `a.weight"), "{text}");
            }
        }
        // scales whose weight is absent, or in another dtype
        let alone = open(folder.path(), &[scales(Dtype::F32, &[1, 2], one())]);
        let text = alone.check_quantized().unwrap_err().to_string();
        let expected = "`a.weight_scale_inv`: expected its weight `a.weight` in F8_E4M3, got no such tensor";
        assert!(text.contains(expected), "{text}");
        let wide = ("a.weight", Dtype::BF16, &[2, 129][..], vec![0; 4 * 129]);
        let wide = open(folder.path(), &[wide, scales(Dtype::F32, &[1, 2], one())]);
        let text = wide.check_quantized().unwrap_err().to_string();
        assert!(text.contains("in F8_E4M3, got BF16"), "{text}");
        assert!(wide.quantized("a.weight").unwrap_err().to_string().contains("expected F8_E4M3, got BF16"));
        // codes that are no numbers, and a vector of codes
        for bad in [0x7f, 0xff] {
            let mut codes = codes.clone();
            codes[130] = bad;
            let weights = open(
                folder.path(),
                &[("a.weight", Dtype::F8E4M3, &[2, 129], codes), scales(Dtype::F32, &[1, 2], one())],
            );
            weights.check_quantized().unwrap();
            let text = weights.quantized("a.weight").unwrap_err().to_string();
            assert!(
                text.contains("`a.weight`: expected numbers, got NaN") && text.contains("[1, 1]"),
                "{text}"
            );
        }
        let flat = open(folder.path(), &[("a.weight", Dtype::F8E4M3, &[4], vec![0; 4])]);
        assert!(flat.check_quantized().unwrap_err().to_string().contains("two axes"));
    }
}
