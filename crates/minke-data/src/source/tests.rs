use super::*;
use std::fs;
use std::path::Path;

fn write(folder: &Path, name: &str, content: impl AsRef<[u8]>) {
    let path = folder.join(name);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, content).unwrap();
}

fn spec(path: &Path) -> SourceSpec {
    SourceSpec { path: path.display().to_string(), ..SourceSpec::default() }
}

fn read(specs: &[SourceSpec]) -> (Vec<Document>, CorpusStats) {
    let corpus = Corpus::open(specs).unwrap();
    let mut documents = corpus.documents();
    let all: Vec<Document> = documents.by_ref().map(Result::unwrap).collect();
    (all, documents.stats())
}

#[test]
fn a_folder_is_read_in_order_and_everything_odd_is_counted() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    write(root, "b/two.md", "second");
    write(root, "a/one.rs", "first");
    write(root, "a/copy.rs", "second");
    write(root, "c/binary.rs", b"ab\0cd");
    write(root, "c/control.txt", [1u8, 2, 3, 4, b'a']);
    write(root, "c/latin.txt", b"caf\xe9");
    write(root, "c/bom.txt", "\u{feff}marked");
    write(root, "c/empty.txt", "");
    write(root, "c/blank.txt", " \n\n");
    write(root, "c/large.txt", "x".repeat(2000));
    write(root, ".hidden/x.rs", "hidden");
    let mut spec = spec(root);
    spec.max_file_bytes = 1000;
    let (documents, stats) = read(std::slice::from_ref(&spec));
    let seen: Vec<(&str, &str)> = documents.iter().map(|d| (d.path.as_str(), d.text.as_str())).collect();
    let expected = [
        ("a/copy.rs", "second"),
        ("a/one.rs", "first"),
        ("c/bom.txt", "marked"),
        ("c/latin.txt", "caf\u{fffd}"),
    ];
    assert_eq!(seen, expected);
    let bytes = seen.iter().map(|(_, text)| text.len() as u64).sum();
    let expected = CorpusStats {
        files: 10,
        documents: 4,
        bytes,
        duplicates: 1,
        binary: 2,
        invalid_utf8: 1,
        skipped_large: 1,
        empty: 2,
    };
    assert_eq!(stats, expected);
    assert_eq!(documents[1].group.as_deref(), Some("a"));
    // a second source with the same content adds nothing, and is no error
    assert_eq!(read(&[spec.clone(), spec]).0.len(), 4);
}

#[test]
fn patterns_choose_files() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["a/x.rs", "a/x.md", "target/y.rs", "z.rs"] {
        write(folder.path(), name, name);
    }
    let mut spec = spec(folder.path());
    spec.include = vec!["rs".into()];
    spec.exclude = vec!["target".into()];
    let paths: Vec<String> = read(std::slice::from_ref(&spec)).0.into_iter().map(|d| d.path).collect();
    assert_eq!(paths, ["a/x.rs", "z.rs"]);
    spec.include = vec!["py".into()];
    let error = Corpus::open(&[spec]).unwrap_err().to_string();
    assert!(error.contains("no file to read"), "{error}");
}

#[test]
fn caps_choose_by_hash_whatever_the_folders_above_are_called() {
    let folder = tempfile::tempdir().unwrap();
    for host in ["index-aaa", "mirror-zzz"] {
        for i in 0..100 {
            write(
                folder.path(),
                &format!("{host}/reg/{host}/pkg{i:03}/lib.rs"),
                format!("content of {i:03}"),
            );
        }
    }
    let choose = |host: &str, cap: &dyn Fn(&mut SourceSpec)| {
        let mut spec = spec(&folder.path().join(host));
        cap(&mut spec);
        let (documents, stats) = read(&[spec]);
        (documents.into_iter().map(|d| d.text).collect::<Vec<_>>(), stats.bytes)
    };
    let (by_count, _) = choose("index-aaa", &|spec| spec.max_files = Some(20));
    assert_eq!(by_count.len(), 20);
    assert_ne!(by_count[19], "content of 019", "not the head of the alphabet");
    assert!(by_count.is_sorted());
    assert_eq!(choose("mirror-zzz", &|spec| spec.max_files = Some(20)).0, by_count);
    let (by_bytes, bytes) = choose("mirror-zzz", &|spec| spec.max_bytes = Some(200));
    assert!((200..=220).contains(&bytes), "{bytes}");
    assert_eq!(by_bytes, choose("index-aaa", &|spec| spec.max_bytes = Some(200)).0);
}

#[test]
fn missing_and_empty_sources_are_named() {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), "a.bin", [0u8; 50]);
    let missing = Corpus::open(&[spec(Path::new("/no/such/place"))]).unwrap_err().to_string();
    assert!(missing.contains("/no/such/place") && missing.contains("does not exist"), "{missing}");
    let corpus = Corpus::open(&[spec(folder.path())]).unwrap();
    let empty = corpus.documents().next().unwrap().unwrap_err().to_string();
    assert!(empty.contains("1 files 1 are binary"), "{empty}");
    assert!(Corpus::open(&[]).is_err());
    for weight in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        assert!(Corpus::open(&[SourceSpec { weight, ..spec(folder.path()) }]).is_err());
    }
    let unset = SourceSpec { path: "$MINKE_SURELY_UNSET/x".into(), ..SourceSpec::default() };
    assert!(Corpus::open(&[unset]).unwrap_err().to_string().contains("MINKE_SURELY_UNSET"));
    let hub = SourceSpec { path: "hf:nobody-at-all/nothing".into(), ..SourceSpec::default() };
    let text = Corpus::open(&[hub]).unwrap_err().to_string();
    assert!(text.contains("nobody-at-all/nothing") && text.contains("hf download"), "{text}");
}

#[test]
fn json_lines_are_documents_and_bad_ones_are_placed() {
    let folder = tempfile::tempdir().unwrap();
    write(
        folder.path(),
        "good.jsonl",
        "{\"text\": \"one\"}\n\n{\"prompt\": \"a\", \"answer\": \"b\"}\n{\"text\":\"last\"}",
    );
    let (documents, stats) = read(&[spec(&folder.path().join("good.jsonl"))]);
    let texts: Vec<&str> = documents.iter().map(|d| d.text.as_str()).collect();
    assert_eq!(texts, ["one", "a\n\nb", "last"]);
    assert_eq!((stats.empty, documents[0].group.as_deref()), (1, None));
    for (bad, why) in
        [("{\"text\": \"x\"}\n{oops}\n", "not JSON"), ("{\"text\": \"x\"}\n{\"body\": 1}\n", "body")]
    {
        write(folder.path(), "bad.jsonl", bad);
        let corpus = Corpus::open(&[spec(&folder.path().join("bad.jsonl"))]).unwrap();
        let error = corpus.documents().find_map(Result::err).unwrap().to_string();
        assert!(error.contains("bad.jsonl, line 2") && error.contains(why), "{error}");
    }
    let deep = format!("{{\"text\": {}", "[".repeat(100_000));
    write(folder.path(), "deep.jsonl", deep);
    let corpus = Corpus::open(&[spec(&folder.path().join("deep.jsonl"))]).unwrap();
    assert!(corpus.documents().next().unwrap().is_err());
    let mut capped = spec(&folder.path().join("long.jsonl"));
    capped.max_file_bytes = 10;
    write(
        folder.path(),
        "long.jsonl",
        format!("{{\"text\": \"{}\"}}\n{{\"text\": \"ok\"}}\n", "x".repeat(200_000)),
    );
    let (documents, stats) = read(&[capped]);
    assert_eq!((documents.len(), stats.skipped_large), (1, 1));
}

#[test]
fn prompts_with_completions_keep_their_border() {
    let folder = tempfile::tempdir().unwrap();
    let lines = [
        r#"{"prompt": "Q: 1+1\n", "completion": "A: 2\n"}"#,
        r#"{"prompt": "Q: 1", "completion": "+1\nA: 2\n"}"#,
        r#"{"prompt": "Q: 2+2\n", "completion": ""}"#,
        r#"{"text": "plain", "prompt": "a", "completion": "b"}"#,
    ];
    write(folder.path(), "pairs.jsonl", lines.join("\n"));
    let (documents, stats) = read(&[spec(&folder.path().join("pairs.jsonl"))]);
    let seen: Vec<(&str, usize)> = documents.iter().map(|d| (d.text.as_str(), d.prompt_bytes)).collect();
    assert_eq!(seen, [("Q: 1+1\nA: 2\n", 7), ("plain", 0)]);
    // the same whole text is a duplicate wherever it is cut, and nothing to learn is nothing
    assert_eq!((stats.duplicates, stats.empty), (1, 1));
}

#[test]
fn a_long_text_named_alone_is_cut_and_nothing_is_lost() {
    let folder = tempfile::tempdir().unwrap();
    let lines: Vec<String> = (0..9000)
        .map(|i| format!("Line {i} of the bök.{}", if i % 7 == 0 { "\n\n" } else { "\n" }))
        .collect();
    let text = lines.concat();
    write(folder.path(), "book.txt", &text);
    let (documents, _) = read(&[spec(&folder.path().join("book.txt"))]);
    assert!(documents.len() >= text.len() / PIECE_BYTES);
    assert!(documents.iter().all(|d| d.text.len() <= PIECE_BYTES && d.text.ends_with('\n')));
    assert_eq!(documents.iter().map(|d| d.text.as_str()).collect::<String>(), text);
}

#[test]
fn parquet_columns_are_documents() {
    use parquet::data_type::{ByteArray, ByteArrayType};
    use parquet::file::writer::SerializedFileWriter;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("rows.parquet");
    let schema = "message rows { REQUIRED INT64 id; OPTIONAL BYTE_ARRAY text (UTF8); }";
    let schema = std::sync::Arc::new(parquet::schema::parser::parse_message_type(schema).unwrap());
    let mut writer =
        SerializedFileWriter::new(File::create(&path).unwrap(), schema, std::sync::Arc::default()).unwrap();
    for group in 0..2i64 {
        let mut rows = writer.next_row_group().unwrap();
        let mut column = rows.next_column().unwrap().unwrap();
        let ids: Vec<i64> = (0..100).collect();
        column.typed::<parquet::data_type::Int64Type>().write_batch(&ids, None, None).unwrap();
        column.close().unwrap();
        let mut column = rows.next_column().unwrap().unwrap();
        let values: Vec<ByteArray> =
            (0..50).map(|i| ByteArray::from(format!("row {group} {i}").into_bytes())).collect();
        let levels: Vec<i16> = (0..100).map(|i| i16::from(i % 2 == 0)).collect();
        column.typed::<ByteArrayType>().write_batch(&values, Some(&levels), None).unwrap();
        column.close().unwrap();
        rows.close().unwrap();
    }
    writer.close().unwrap();
    let (documents, _) = read(&[spec(&path)]);
    assert_eq!(documents.len(), 100);
    assert_eq!(documents[0].text, "row 0 0");
    assert_eq!(documents[99].text, "row 1 49");

    let wrong = SourceSpec { text_field: "body".into(), ..spec(&path) };
    let error = Corpus::open(&[wrong]).unwrap().documents().next().unwrap().unwrap_err().to_string();
    assert!(error.contains("no column `body`") && error.contains("id, text"), "{error}");
    let good = fs::read(&path).unwrap();
    for cut in [0, 3, 8, good.len() / 2, good.len() - 5] {
        fs::write(&path, &good[..cut]).unwrap();
        assert!(Corpus::open(&[spec(&path)]).unwrap().documents().any(|d| d.is_err()), "cut at {cut}");
    }
}
