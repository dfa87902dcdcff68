//! `minke score` against what Hugging Face transformers computed for the same weights.

mod common;

use common::{good, minke, refused, snapshot, text, vectors, vectors_root};
use minke_data::hf::{Dtype, WeightFiles};
use serde_json::Value;

fn input_ids(file: &WeightFiles) -> (Vec<Vec<i64>>, usize) {
    let view = file.get("input_ids").unwrap();
    assert_eq!(view.dtype, Dtype::I64);
    let t = view.shape[1];
    let ids: Vec<i64> =
        view.bytes.chunks_exact(8).map(|eight| i64::from_le_bytes(eight.try_into().unwrap())).collect();
    (ids.chunks(t).map(<[i64]>::to_vec).collect(), t)
}

#[test]
fn logits_are_those_of_transformers() {
    let mut folders = 0;
    for entry in std::fs::read_dir(vectors_root()).unwrap() {
        let folder = entry.unwrap().path();
        let reference = WeightFiles::open_file(folder.join("vectors.safetensors")).unwrap();
        let (ids, t) = input_ids(&reference);
        let scratch = tempfile::tempdir().unwrap();
        let (tokens, logits) =
            (scratch.path().join("tokens.json"), scratch.path().join("logits.safetensors"));
        std::fs::write(&tokens, serde_json::json!({ "sequences": ids }).to_string()).unwrap();
        let args = ["score", text(&folder), "--tokens", text(&tokens), "--logits", text(&logits), "--json"];
        let report: Value = serde_json::from_str(&good(&args)).unwrap();
        let got = WeightFiles::open_file(&logits).unwrap();
        assert_eq!(got.len(), ids.len());
        let expected = reference.read_f32("logits").unwrap();
        let w = reference.get("logits").unwrap().shape[2];
        let mut losses = Vec::new();
        for (number, expected) in expected.chunks(t * w).enumerate() {
            let name = format!("logits.{number}");
            assert_eq!(got.get(&name).unwrap().shape, [t, w]);
            assert_eq!(got.get(&name).unwrap().dtype, Dtype::F32);
            let rows = got.read_f32(&name).unwrap();
            let worst = rows.iter().zip(expected).map(|(a, b)| (a - b).abs());
            let worst = worst.fold(0.0, |worst: f32, x| if x.is_nan() { f32::NAN } else { worst.max(x) });
            assert!(worst < 1e-4, "{}: {worst}", folder.display());
            let one = &report["sequences"][number];
            let scores = one["logprobs"].as_array().unwrap();
            assert_eq!((scores.len(), one["tokens"].as_u64(), &scores[0]), (t, Some(t as u64), &Value::Null));
            losses.extend(scores[1..].iter().map(|x| -x.as_f64().unwrap()));
        }
        let mean = losses.iter().sum::<f64>() / losses.len() as f64;
        let loss = f64::from(reference.read_f32("loss").unwrap()[0]);
        assert!((mean - loss).abs() < 1e-5, "{}: {mean} against {loss}", folder.display());
        folders += 1;
    }
    assert!(folders >= 14, "{folders} folders of vectors");
}

#[test]
fn any_number_of_threads_gives_the_same_bits() {
    let scratch = tempfile::tempdir().unwrap();
    let tokens = scratch.path().join("tokens.json");
    std::fs::write(&tokens, r#"{"sequences": [[5, 3, 90, 2, 17], [8], []]}"#).unwrap();
    let folder = vectors("v3_groups_published");
    let files: Vec<Vec<u8>> = ["1", "2", "3"]
        .into_iter()
        .map(|threads| {
            let out = scratch.path().join(format!("{threads}.safetensors"));
            let args = [
                "score",
                text(&folder),
                "--tokens",
                text(&tokens),
                "--logits",
                text(&out),
                "--threads",
                threads,
            ];
            let table = good(&args);
            assert!(table.contains("logits of shape [tokens, 96]"), "{table}");
            std::fs::read(out).unwrap()
        })
        .collect();
    assert!(files[0] == files[1] && files[1] == files[2]);
}

#[test]
fn tokens_that_are_wrong_are_refused_before_anything_is_written() {
    let scratch = tempfile::tempdir().unwrap();
    let (tokens, out) = (scratch.path().join("tokens.json"), scratch.path().join("out.safetensors"));
    std::fs::write(&out, b"what was there").unwrap();
    let long: Vec<u32> = vec![1; 300];
    let cases = [
        (
            r#"{"sequences": [[1], [2, 96]]}"#.to_owned(),
            "sequence 1: token 1: id 96 is outside the vocabulary of 96 tokens",
        ),
        (r#"{"sequences": [[1, -2]]}"#.to_owned(), "invalid value: integer `-2`, expected u32"),
        (r#"{"sequences": [[1.5]]}"#.to_owned(), "expected u32"),
        (r#"{"tokens": [[1]]}"#.to_owned(), "missing field `sequences`"),
        ("[".to_owned(), "EOF"),
        (
            serde_json::json!({ "sequences": [long] }).to_string(),
            "300 tokens do not fit into the model's context of 256",
        ),
        ("[".repeat(200_000), "tokens.json"),
    ];
    for (content, expected) in cases {
        std::fs::write(&tokens, content).unwrap();
        let before = snapshot(scratch.path());
        let folder = vectors("v3_plain");
        let error = refused(&["score", text(&folder), "--tokens", text(&tokens), "--logits", text(&out)]);
        assert!(error.contains(expected) && error.contains("hint: "), "{expected}: {error}");
        assert!(snapshot(scratch.path()) == before, "{expected}: files changed");
    }
    let folder = vectors("v3_plain");
    let gone = refused(&["score", text(&folder), "--tokens", "/nonexistent-minke/tokens.json"]);
    assert!(gone.contains("cannot read /nonexistent-minke/tokens.json"), "{gone}");
    std::fs::write(&tokens, r#"{"sequences": [[1]]}"#).unwrap();
    let nowhere = refused(&[
        "score",
        text(&folder),
        "--tokens",
        text(&tokens),
        "--logits",
        "/nonexistent-minke/out.safetensors",
    ]);
    assert!(nowhere.contains("/nonexistent-minke"), "{nowhere}");
    // a full disk is not the user's argument: exit code 1, and the file is not there
    if std::path::Path::new("/dev/full").exists() {
        let run = minke(&["score", text(&folder), "--tokens", text(&tokens), "--logits", "/dev/full/out"]);
        assert_ne!(run.code, 0);
    }
}
