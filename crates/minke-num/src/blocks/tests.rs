use std::path::PathBuf;

use half::bf16;
use proptest::prelude::*;

use super::*;

fn vectors(name: &str) -> Vec<u8> {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/vectors/blocks");
    std::fs::read(folder.join(name)).unwrap()
}

fn numbers(name: &str) -> Vec<f32> {
    vectors(name).chunks_exact(2).map(|pair| bf16::from_le_bytes([pair[0], pair[1]]).to_f32()).collect()
}

fn coded(format: BlockFormat, x: &[f32], importance: Option<&[f32]>) -> (Vec<u8>, Vec<f32>) {
    let mut bytes = vec![0xa5; format.row_bytes(x.len()).unwrap()];
    encode(format, x, importance, &mut bytes).unwrap();
    let mut y = vec![0.0; x.len()];
    decode(format, &bytes, &mut y);
    (bytes, y)
}

fn relative_error(x: &[f32], y: &[f32], w: impl Fn(usize) -> f32) -> f64 {
    let sum = |of: &dyn Fn(usize) -> f32| -> f64 {
        (0..x.len()).map(|i| f64::from(w(i)) * f64::from(of(i)).powi(2)).sum()
    };
    (sum(&|i| x[i] - y[i]) / sum(&|i| x[i])).sqrt()
}

/// Any block whatever decodes to the bits that gguf's `dequantize` gives.
#[test]
fn decodes_as_gguf_does() {
    for format in BlockFormat::ALL {
        let bytes = vectors(&format!("{}.bin", format.name()));
        let blocks = bytes.len() / (format.block_bytes() + 4 * format.block_len());
        let (bytes, expected) = bytes.split_at(blocks * format.block_bytes());
        let mut got = vec![0.0; blocks * format.block_len()];
        decode(format, bytes, &mut got);
        for (i, (got, expected)) in got.iter().zip(expected.as_chunks().0).enumerate() {
            let expected = f32::from_le_bytes(*expected);
            let same = got.to_bits() == expected.to_bits() || got.is_nan() && expected.is_nan();
            assert!(same, "{}[{i}]: got {got}, expected {expected}", format.name());
        }
    }
}

/// Without importance as without weights; with, in the error that it is about.
#[test]
fn loses_no_more_than_ggml() {
    let (x, columns) = (numbers("rows.bf16"), numbers("columns.bf16"));
    let cols = columns.len();
    let text = String::from_utf8(vectors("ggml.txt")).unwrap();
    assert_eq!(text.lines().count(), BlockFormat::ALL.len());
    for line in text.lines() {
        let words: Vec<&str> = line.split(' ').collect();
        let format = BlockFormat::ALL.into_iter().find(|format| format.name() == words[0]).unwrap();
        let theirs: Vec<f64> = words[1..].iter().map(|word| word.parse().unwrap()).collect();
        let (plain, weighted): (Vec<f32>, Vec<f32>) = x
            .chunks_exact(cols)
            .flat_map(|row| {
                let (plain, weighted) = (coded(format, row, None).1, coded(format, row, Some(&columns)).1);
                plain.into_iter().zip(weighted)
            })
            .unzip();
        let ours =
            [relative_error(&x, &plain, |_| 1.0), relative_error(&x, &weighted, |i| columns[i % cols])];
        for (ours, theirs) in ours.iter().zip(&theirs) {
            assert!(ours <= theirs, "{line}: got {ours:.6}");
            // (a quantiser that lost much less would have found bits that there are not)
            assert!(*ours > 0.7 * theirs, "{line}: got {ours:.6}");
        }
    }
}

#[test]
fn an_importance_moves_error_to_columns_without() {
    let x = &numbers("rows.bf16")[..256];
    let mut importance = vec![1e-6; 256];
    importance.iter_mut().step_by(8).for_each(|w| *w = 1.0);
    let of_important = |i: usize| if i.is_multiple_of(8) { 1.0 } else { 0.0 };
    for format in BlockFormat::ALL {
        let error = |importance| relative_error(x, &coded(format, x, importance).1, of_important);
        let (with, without) = (error(Some(&importance)), error(None));
        assert!(with < 0.8 * without, "{}: {with} with, {without} without", format.name());
    }
}

#[test]
fn importance_of_nothing_is_none() {
    let x = &numbers("rows.bf16")[..512];
    for format in BlockFormat::ALL {
        assert_eq!(coded(format, x, Some(&[0.0; 512])).0, coded(format, x, None).0, "{}", format.name());
    }
}

#[test]
fn refuses_what_is_not_finite() {
    let mut x = vec![0.5; 256];
    let mut out = vec![0; 256];
    for format in BlockFormat::ALL {
        let out = &mut out[..0];
        assert_eq!(encode(format, &[], None, out), Ok(()));
    }
    for got in [f32::INFINITY, f32::NEG_INFINITY] {
        x[70] = got;
        let error = encode(BlockFormat::Q4K, &x, None, &mut out[..144]);
        assert_eq!(error, Err(EncodeError::NotFinite { column: 70, got }));
    }
    x[70] = f32::NAN;
    let error = encode(BlockFormat::Q8_0, &x[64..96], None, &mut out[..34]).unwrap_err();
    assert_eq!(error.to_string(), "column 6: expected a finite number, got NaN");
    x[70] = 0.0;
    let mut w = vec![1.0; 256];
    for got in [-1.0, f32::INFINITY] {
        w[255] = got;
        let error = encode(BlockFormat::Q6K, &x, Some(&w), &mut out[..210]);
        assert_eq!(error, Err(EncodeError::Importance { column: 255, got }));
    }
}

/// The hostile: zeros, one outlier, equal numbers, numbers past and below what a block can hold.
#[test]
fn awkward_rows() {
    let outlier = |at: f32| std::array::from_fn::<f32, 256, _>(|i| if i == 77 { at } else { 0.01 });
    for format in BlockFormat::ALL {
        let name = format.name();
        assert_eq!(coded(format, &[0.0; 256], None).1, [0.0; 256], "{name}");
        assert_eq!(coded(format, &[-0.0; 256], Some(&[1.0; 256])).1, [0.0; 256], "{name}");
        for x in [[0.25; 256], [-0.25; 256], outlier(3.0), outlier(-3.0)] {
            let error = relative_error(&x, &coded(format, &x, None).1, |_| 1.0);
            assert!(error < 0.15, "{name} of {}..: {error}", x[77]);
        }
        for x in [1e-9, 1e-38, 1e-45, 1e12, f32::MAX, f32::MIN] {
            let y = coded(format, &outlier(x), Some(&[f32::MAX; 256])).1;
            assert!(y.iter().all(|y| y.is_finite()), "{name} of {x}");
            if x.abs() > 1e9 {
                assert!(y[77] * x.signum() > 6e4, "{name} of {x}: {}", y[77]);
            }
        }
    }
}

#[test]
fn small_scales_lie_where_they_are_looked_for() {
    let six = |seed: usize| std::array::from_fn::<u8, 16, _>(|i| ((i * 37 + seed * 11) % 64) as u8);
    for seed in 0..64 {
        let all = six(seed);
        let pairs = [*all.first_chunk().unwrap(), *all.last_chunk().unwrap()];
        assert_eq!(bits::unpack_pairs(&bits::pack_pairs(&pairs)), pairs);
        assert_eq!(bits::unpack_sixteen(&bits::pack_sixteen(&all)), all);
        let (high, low) = bits::pack_eight(pairs[1]);
        assert_eq!(bits::unpack_eight(high, low), pairs[1]);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// No number ends up farther from what it was than a step and the rounding of the scales; whole blocks are encoded
    /// alone as in a row.
    #[test]
    fn round_trips(
        format in prop::sample::select(&BlockFormat::ALL[..]),
        x in prop::collection::vec(-2.0f32..2.0, 512),
        w in prop::collection::vec(0.01f32..10.0, 512),
        scale in prop::sample::select(&[1e-3f32, 1.0, 300.0][..]),
    ) {
        let x: Vec<f32> = x.iter().map(|x| x * scale).collect();
        let step = match format {
            BlockFormat::Q2K => 1.4,
            BlockFormat::Q3K => 0.8,
            BlockFormat::Q8_0 | BlockFormat::Q6K => 0.06,
            BlockFormat::Q5_0 | BlockFormat::Q5_1 | BlockFormat::Q5K => 0.2,
            _ => 0.4,
        };
        for importance in [None, Some(&w[..])] {
            let (bytes, y) = coded(format, &x, importance);
            let error = relative_error(&x, &y, |_| 1.0);
            prop_assert!(error < step / 2.0, "{}: {error}", format.name());
            let alone = coded(format, &x[256..], importance.map(|w| &w[256..])).0;
            prop_assert_eq!(&bytes[bytes.len() / 2..], &alone[..]);
        }
    }

    /// Nothing that is finite makes a panic, or a block that is not.
    #[test]
    fn any_numbers(
        format in prop::sample::select(&BlockFormat::ALL[..]),
        x in prop::collection::vec(any::<f32>(), 256),
        w in prop::collection::vec(any::<f32>(), 256),
    ) {
        let finite = |x: &f32| if x.is_finite() { *x } else { 0.0 };
        let (x, w): (Vec<f32>, Vec<f32>) = (x.iter().map(finite).collect(), w.iter().map(|w| finite(w).abs()).collect());
        for importance in [None, Some(&w[..])] {
            prop_assert!(coded(format, &x, importance).1.iter().all(|y| y.is_finite()));
        }
    }

    /// Nor any bytes.
    #[test]
    fn any_bytes(format in prop::sample::select(&BlockFormat::ALL[..]), bytes in prop::collection::vec(any::<u8>(), 210)) {
        let mut out = vec![0.0; format.block_len()];
        decode(format, &bytes[..format.block_bytes()], &mut out);
    }
}
