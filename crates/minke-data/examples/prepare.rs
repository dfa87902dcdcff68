//! Prepares a folder of text as a recipe would, and prints what came out: `prepare PATH CACHE [BYTES] [VOCABULARY]`.

use std::time::Instant;

use minke_data::{
    DataSettings, Evaluation, Loader, LoaderOptions, Packing, SourceSpec, TokenizerSpec, TrainOptions,
    compress, prepare,
};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [path, cache, rest @ ..] = arguments.as_slice() else {
        return Err("usage: prepare PATH CACHE [BYTES] [VOCABULARY]".into());
    };
    let max_bytes = rest.first().map(|text| text.parse()).transpose()?;
    let vocab_size = rest.get(1).map(|text| text.parse()).transpose()?.unwrap_or(4096);
    let include = ["rs", "md", "txt"].map(str::to_owned).to_vec();
    let settings = DataSettings {
        sources: vec![SourceSpec { path: path.clone(), include, max_bytes, ..SourceSpec::default() }],
        validation_share: 0.01,
        split_by_group: true,
        tokenizer: TokenizerSpec::Train {
            options: TrainOptions { vocab_size, ..TrainOptions::default() },
            sample_bytes: 16 << 20,
        },
        cache: cache.into(),
        threads: std::thread::available_parallelism()?.get(),
    };
    let start = Instant::now();
    let mut stage = None;
    let prepared = prepare(&settings, &mut |progress| {
        if stage != Some(progress.stage) {
            println!("{:6.1} s  {:?}", start.elapsed().as_secs_f64(), progress.stage);
            stage = Some(progress.stage);
        }
    })?;
    println!(
        "{:6.1} s  done, reused: {}, in {}",
        start.elapsed().as_secs_f64(),
        prepared.reused,
        prepared.folder.display()
    );
    println!("{:?}", prepared.stats);
    let options = LoaderOptions {
        sequence_len: 256,
        batch: 16,
        seed: 1,
        mtp_depth: 1,
        document_borders: true,
        packing: Packing::Stream,
    };
    let bytes_per_token = prepared.train.text_bytes() as f64 / prepared.train.tokens() as f64;
    println!("train: {} tokens, {bytes_per_token:.3} bytes per token", prepared.train.tokens());
    let loader = Loader::new(prepared.train, options)?;
    let start = Instant::now();
    for step in 0..1000 {
        loader.batch(step)?;
    }
    println!("{} windows, {:.3} ms per batch", loader.windows(), start.elapsed().as_secs_f64());
    if let (Some(validation), Some(text)) = (prepared.validation, prepared.validation_text) {
        println!("validation: {} tokens, {} bytes", validation.tokens(), validation.text_bytes());
        println!("validation batches: {}", Evaluation::new(validation, options)?.batches());
        let start = Instant::now();
        let bits = compress::zstd_bits_per_byte(std::fs::File::open(text)?)?;
        println!("zstd: {bits:.4} bits per byte in {:.1} s", start.elapsed().as_secs_f64());
    }
    Ok(())
}
