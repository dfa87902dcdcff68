//! FP8 weights that torch quantised, against what transformers makes of them; `scripts/fp8_vectors.py` wrote both.

use std::path::PathBuf;

use minke_data::hf::WeightFiles;
use minke_num::fp8::{Quantized, scale_shape};
use minke_num::tolerance::assert_same_bits;

fn vectors(file: &str) -> WeightFiles {
    let folder = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/vectors/fp8"));
    WeightFiles::open_file(folder.join(file)).unwrap()
}

#[test]
fn numbers_are_those_of_transformers() {
    let (model, expected) = (vectors("model.safetensors"), vectors("expected.safetensors"));
    model.check_quantized().unwrap();
    for name in ["f32", "ue8m0", "bf16", "e8m0", "whole", "one"] {
        let name = format!("{name}.weight");
        assert_same_bits(&name, &model.read_f32(&name).unwrap(), &expected.read_f32(&name).unwrap());
        let q = model.quantized(&name).unwrap();
        assert_eq!(expected.get(&name).unwrap().shape, [q.rows, q.cols]);
        assert_eq!(q.scales.len(), scale_shape(q.rows, q.cols).iter().product::<usize>());
    }
}

#[test]
fn codes_and_scales_are_those_of_torch() {
    let (model, expected) = (vectors("model.safetensors"), vectors("expected.safetensors"));
    for (name, power_of_two) in [("f32", false), ("ue8m0", true)] {
        let theirs = model.quantized(&format!("{name}.weight")).unwrap();
        let w = expected.read_f32(&format!("{name}.source")).unwrap();
        let ours = Quantized::quantize(&w, theirs.rows, theirs.cols, power_of_two);
        assert_same_bits(name, &ours.scales, &theirs.scales);
        assert!(ours.codes == theirs.codes, "{name}");
        // and quantising what they stand for changes no number
        let again = Quantized::quantize(&theirs.dequantize(), theirs.rows, theirs.cols, power_of_two);
        assert_same_bits(name, &again.dequantize(), &theirs.dequantize());
    }
}
