use super::*;
use crate::shards::tests::write_counting;
use proptest::prelude::*;

fn shards(lengths: &[usize]) -> ShardSet {
    let folder = tempfile::tempdir().unwrap();
    let paths = [folder.path().join("a"), folder.path().join("b")];
    let half = lengths.len().div_ceil(2);
    if half == lengths.len() {
        write_counting(&paths[0], lengths, 0);
        return ShardSet::open(&paths[..1]).unwrap();
    }
    write_counting(&paths[0], &lengths[..half], 0);
    write_counting(&paths[1], &lengths[half..], lengths[..half].iter().sum());
    // the maps outlive the folder
    ShardSet::open(&paths).unwrap()
}

fn options(sequence_len: usize, batch: usize, mtp_depth: usize, document_borders: bool) -> LoaderOptions {
    LoaderOptions { sequence_len, batch, seed: 7, mtp_depth, document_borders }
}

#[test]
fn permutations_are_permutations() {
    for n in (1..70).chain([255, 256, 257, 1000, 4097]) {
        let mut seen = vec![false; n as usize];
        for at in 0..n {
            let to = permute(at, n, 3, 1);
            assert!(!std::mem::replace(&mut seen[to as usize], true), "{n}: {to} twice");
        }
    }
    let orders: Vec<Vec<u64>> = [(1, 0), (1, 1), (2, 0)]
        .iter()
        .map(|&(s, e)| (0..1000).map(|at| permute(at, 1000, s, e)).collect())
        .collect();
    assert!(orders[0] != orders[1] && orders[0] != orders[2] && orders[1] != orders[2]);
    let moved = orders[0].iter().enumerate().filter(|(at, to)| *at as u64 != **to).count();
    let rising = orders[0].windows(2).filter(|pair| pair[0] < pair[1]).count();
    assert!(moved > 980 && (430..570).contains(&rising), "{moved} {rising}");
    assert!(permute(u64::MAX - 1, u64::MAX, 1, 1) < u64::MAX);
}

#[test]
fn an_epoch_visits_every_window_once() {
    let loader = Loader::new(shards(&[40, 3, 90, 11]), options(8, 3, 2, true)).unwrap();
    let n = loader.windows();
    assert_eq!(n, (40 + 3 + 90 + 11 + 8 - 3) / 8);
    for epoch in 0..3 {
        let draws = epoch * n..(epoch + 1) * n;
        let mut windows: Vec<u64> = draws.map(|draw| loader.window(draw / 3, (draw % 3) as usize)).collect();
        windows.sort_unstable();
        assert_eq!(windows, (0..n).collect::<Vec<_>>());
    }
}

#[test]
fn a_batch_depends_on_seed_and_step_only() {
    let set = shards(&[400, 30, 90]);
    let loader = Loader::new(set.clone(), options(16, 4, 1, true)).unwrap();
    let forward: Vec<Batch> = (0..20).map(|step| loader.batch(step).unwrap()).collect();
    let again = Loader::new(set.clone(), options(16, 4, 1, true)).unwrap();
    for step in (0..20).rev() {
        assert_eq!(again.batch(step).unwrap(), forward[step as usize]);
    }
    let other = Loader::new(set, LoaderOptions { seed: 8, ..options(16, 4, 1, true) }).unwrap();
    assert_ne!(other.batch(0).unwrap(), forward[0]);
}

#[test]
fn a_row_by_hand() {
    // the stream: bos 16 17 18 eos | bos 19 20 eos
    for borders in [false, true] {
        let evaluation = Evaluation::new(shards(&[3, 2]), options(8, 1, 1, borders)).unwrap();
        assert_eq!(evaluation.batches(), 1);
        let batch = evaluation.batch(0).unwrap();
        assert_eq!(batch.tokens_bt, [0, 16, 17, 18, 1, 0, 19, 20]);
        let gap = if borders { NO_LABEL } else { 0 };
        assert_eq!(batch.labels_bt[0], [16, 17, 18, 1, gap, 19, 20, 1]);
        let n = NO_LABEL;
        assert_eq!(batch.labels_bt[1], [17, 18, 1, n, n, 20, 1, n]);
        let segments: Vec<(usize, usize)> = batch.segments.iter().map(|s| (s.start, s.len)).collect();
        if borders {
            assert_eq!(segments, [(0, 5), (5, 3)]);
            assert_eq!(batch.positions_bt, [0, 1, 2, 3, 4, 0, 1, 2]);
        } else {
            assert_eq!(segments, [(0, 8)]);
            assert_eq!(batch.positions_bt, [0, 1, 2, 3, 4, 5, 6, 7]);
        }
        assert_eq!(batch.text_bytes, 15);
        assert_eq!(batch.label_count(0), if borders { 7 } else { 8 });
    }
}

#[test]
fn impossible_settings_are_errors() {
    let set = shards(&[3]);
    for bad in
        [options(0, 1, 0, true), options(1, 0, 0, true), options(1, 1, 99, true), options(5, 1, 0, true)]
    {
        assert!(Loader::new(set.clone(), bad).is_err(), "{bad:?}");
    }
    assert!(Loader::new(set, options(4, 1, 0, true)).is_ok());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn loader_laws(
        lengths in prop::collection::vec(0usize..25, 1..12),
        len in 1usize..12,
        rows in 1usize..4,
        depth in 0usize..4,
        borders: bool,
    ) {
        let set = shards(&lengths);
        let mut stream = vec![0; set.tokens() as usize];
        set.read(0, &mut stream).unwrap();
        let document: Vec<u64> = (0..set.tokens()).map(|token| set.document_at(token)).collect();
        let options = options(len, rows, depth, borders);
        let wide = len + 1 + depth;

        let evaluation = Evaluation::new(set.clone(), options).unwrap();
        let (mut bytes, mut labelled, mut next) = (0, 0, 0);
        let mut batches: Vec<(Batch, Vec<u64>)> = Vec::new();
        for index in 0..evaluation.batches() {
            let batch = evaluation.batch(index).unwrap();
            bytes += batch.text_bytes;
            labelled += batch.label_count(0) as u64;
            let starts = (0..batch.rows as u64).map(|row| (next + row) * len as u64).collect();
            next += batch.rows as u64;
            batches.push((batch, starts));
        }
        // everything but the first token is predicted once; with borders, but each document's first
        let unpredicted = if borders { set.documents() } else { 1 };
        prop_assert_eq!(labelled, set.tokens() - unpredicted);
        prop_assert_eq!(bytes, set.text_bytes());

        if let Ok(loader) = Loader::new(set.clone(), options) {
            for step in 0..4 {
                let starts = (0..rows).map(|row| loader.window(step, row) * len as u64).collect();
                batches.push((loader.batch(step).unwrap(), starts));
            }
        }
        for (batch, starts) in &batches {
            let covered: usize = batch.segments.iter().map(|s| s.len).sum();
            prop_assert_eq!(covered, batch.rows * len);
            for (row, &start) in starts.iter().enumerate() {
                let start = start as usize;
                for i in 0..len {
                    let at = row * len + i;
                    prop_assert_eq!(batch.tokens_bt[at], batch.windows_bt[row * wide + i]);
                    let held = start + i < stream.len();
                    if held {
                        prop_assert_eq!(batch.tokens_bt[at], stream[start + i]);
                    }
                    for k in 0..=depth {
                        let to = start + i + k + 1;
                        let same = to < stream.len() && document[start + i] == document[to];
                        let expected = same || (k == 0 && !borders && to < stream.len());
                        let label = batch.labels_bt[k][at];
                        prop_assert_eq!(label, if expected { stream[to] } else { NO_LABEL });
                    }
                }
                if !borders {
                    continue;
                }
                for segment in batch.segments.iter().filter(|s| s.row == row) {
                    let tokens = start + segment.start..(start + segment.start + segment.len).min(stream.len());
                    prop_assert!(tokens.clone().all(|token| document[token] == document[tokens.start]));
                    for i in 0..segment.len {
                        prop_assert_eq!(batch.positions_bt[row * len + segment.start + i], i as u32);
                    }
                }
            }
        }
    }
}
