use super::*;
use crate::{ShardSet, Tokenizer, TrainOptions};
use std::fs;
use std::path::{Path, PathBuf};

/// A tokenizer whose every byte is a token.
pub(crate) fn byte_tokenizer() -> Tokenizer {
    let options = TrainOptions { vocab_size: 272, digits: 1, threads: 1 };
    Tokenizer::train(&["a".to_owned()], &options).unwrap()
}

/// Documents whose text tokens count up from 16, so that a token tells where it came from.
pub(crate) fn write_counting(path: &Path, lengths: &[usize], first: usize) {
    let documents: Vec<(usize, usize)> = lengths.iter().map(|&length| (length, 0)).collect();
    write_with_contexts(path, &documents, first);
}

/// The same, of lengths with how much of them is context.
pub(crate) fn write_with_contexts(path: &Path, documents: &[(usize, usize)], first: usize) {
    let mut writer = ShardWriter::create(path, &byte_tokenizer()).unwrap();
    let mut next = first;
    for &(length, context) in documents {
        let ids: Vec<u32> = (0..length).map(|i| 16 + ((next + i) % 250) as u32).collect();
        next += length;
        writer.push(&ids, context, (length - context) as u64 * 3).unwrap();
    }
    writer.finish().unwrap();
}

#[test]
fn what_is_written_is_read_across_shards() {
    let folder = tempfile::tempdir().unwrap();
    let paths: Vec<PathBuf> = (0..3).map(|i| folder.path().join(format!("{i}.shard"))).collect();
    let lengths = [vec![3, 0, 5], vec![1], vec![7, 2]];
    let mut first = 0;
    let mut expected = Vec::new();
    let mut spans = Vec::new();
    for (path, lengths) in paths.iter().zip(&lengths) {
        write_counting(path, lengths, first);
        for &length in lengths {
            let start = expected.len() as u64;
            expected.push(0);
            expected.extend((first..first + length).map(|i| 16 + (i % 250) as u32));
            expected.push(1);
            first += length;
            spans.push((start..expected.len() as u64, length as u64 * 3));
        }
    }
    let set = ShardSet::open(&paths).unwrap();
    set.verify().unwrap();
    assert_eq!((set.tokens(), set.documents(), set.frame()), (expected.len() as u64, 6, (1, 1)));
    assert_eq!(set.text_bytes(), 18 * 3);
    for start in 0..expected.len() {
        for end in start..=expected.len() {
            let mut out = vec![9; end - start];
            set.read(start as u64, &mut out).unwrap();
            assert_eq!(out, expected[start..end]);
        }
    }
    for (number, (tokens, bytes)) in spans.iter().enumerate() {
        let span = set.document(number as u64);
        assert_eq!((&span.tokens, span.text_bytes), (tokens, *bytes));
        for token in tokens.clone() {
            assert_eq!(set.document_at(token), number as u64);
        }
    }
}

#[test]
fn contexts_are_kept() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.shard");
    write_with_contexts(&path, &[(5, 2), (4, 0), (3, 3)], 0);
    let set = ShardSet::open(&[&path]).unwrap();
    set.verify().unwrap();
    let spans: Vec<_> =
        (0..3).map(|at| set.document(at)).map(|span| (span.context, span.text_bytes)).collect();
    // bos belongs to the context
    assert_eq!(spans, [(3, 9), (0, 12), (4, 0)]);
    assert!(set.has_context() && set.text_bytes() == 21);
    write_counting(&path, &[5], 0);
    assert!(!ShardSet::open(&[&path]).unwrap().has_context());
}

#[test]
fn damaged_shards_are_errors_with_their_path() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.shard");
    write_counting(&path, &[30, 40, 50], 0);
    let good = fs::read(&path).unwrap();
    let open = |bytes: &[u8]| {
        fs::write(&path, bytes).unwrap();
        ShardSet::open(&[&path])
    };
    for cut in 0..good.len() {
        let text = open(&good[..cut]).unwrap_err().to_string();
        assert!(text.contains("a.shard"), "{text}");
    }
    assert!(open(&[good.clone(), vec![0]].concat()).is_err());
    let with = |at: usize, bytes: &[u8]| {
        let mut bad = good.clone();
        bad[at..at + bytes.len()].copy_from_slice(bytes);
        bad
    };
    let index = good.len() - 3 * INDEX_BYTES as usize;
    for (at, bytes, why) in [
        (0, &b"NOTTOKEN"[..], "not a shard"),
        (8, &9u32.to_le_bytes()[..], "version"),
        (8, &1u32.to_le_bytes()[..], "expected version 2, got 1; delete it"),
        (12, &3u32.to_le_bytes()[..], "bytes per token"),
        (16, &64u32.to_le_bytes()[..], "flags"),
        (24, &u64::MAX.to_le_bytes()[..], "impossible"),
        (24, &(u64::MAX / 2).to_le_bytes()[..], "impossible"),
        (32, &u64::MAX.to_le_bytes()[..], "impossible"),
        (32, &2u64.to_le_bytes()[..], "expected"),
        (40, &0u64.to_le_bytes()[..], "vocabulary"),
        (index, &1u64.to_le_bytes()[..], "out of order"),
        (index + 8, &0u64.to_le_bytes()[..], "out of order"),
        (index + 16, &u64::MAX.to_le_bytes()[..], "out of order"),
        (index + 48, &33u64.to_le_bytes()[..], "document 0 has 32 tokens and 33 of context"),
        (index + 64, &u64::MAX.to_le_bytes()[..], "of context"),
    ] {
        let text = open(&with(at, bytes)).unwrap_err().to_string();
        assert!(text.contains(why) && text.contains("a.shard"), "{why}: {text}");
    }
    // a token that the vocabulary does not have is found when it is read
    let set = open(&with(HEADER_BYTES + 10, &60000u16.to_le_bytes())).unwrap();
    let mut out = [0; 8];
    assert!(set.read(0, &mut out).unwrap_err().to_string().contains("token 5 is 60000"));
    assert!(set.verify().is_err());
}

#[test]
fn an_unfinished_shard_never_appears() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.shard");
    write_counting(&path, &[3], 0);
    let before = fs::read(&path).unwrap();
    let mut writer = ShardWriter::create(&path, &byte_tokenizer()).unwrap();
    writer.push(&[20; 1000], 0, 1000).unwrap();
    assert!(writer.push(&[272], 0, 1).is_err());
    drop(writer);
    assert_eq!(fs::read(&path).unwrap(), before);
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
}
