use insta::assert_snapshot;
use minke_model::config::{AttentionKind, Family, FfnKind, ProjectionBias};
use minke_model::spec;

use super::*;

fn parse(text: &str, overrides: &[&str]) -> Result<Recipe, RecipeError> {
    let overrides: Vec<String> = overrides.iter().map(|&text| text.to_owned()).collect();
    Recipe::parse("r.toml", text, &overrides)
}

fn resolve(text: &str, overrides: &[&str]) -> Resolved {
    parse(text, overrides).and_then(|recipe| recipe.resolve()).unwrap_or_else(|error| panic!("{error}"))
}

fn error(text: &str, overrides: &[&str]) -> String {
    match parse(text, overrides).and_then(|recipe| recipe.resolve()) {
        Ok(_) => panic!("no error in {text:?} {overrides:?}"),
        Err(error) => error.to_string(),
    }
}

const RANDOM: &str = "[model]\nvocab_size = 512\n[data]\nrandom = true\n";

fn shipped(name: &str) -> Resolved {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../recipes").join(name);
    Recipe::load(&path, &[]).and_then(|recipe| recipe.resolve()).unwrap_or_else(|error| panic!("{error}"))
}

#[test]
fn fp8_is_for_linear_layers() {
    use minke_model::DType::{Bf16, F32};
    let precision = |text: &str| -> minke_model::Precision {
        resolve(&format!("{text}\n{RANDOM}"), &[]).precision.into()
    };
    let word = precision("precision = 'fp8'");
    assert_eq!(word, minke_model::Precision::fp8(minke_model::Fp8::default()));
    assert_eq!((word.head, word.router), (Bf16, F32));
    let table =
        precision("precision = { linear = 'fp8', expert = 'bf16', scaling = 'tensor', scales = 'ue8m0' }");
    assert!(table.coded.linear && !table.coded.expert && !table.coded.attention);
    assert!(table.coded.how.power_of_two && table.coded.how.per_tensor && table.coded.couples_rows());
    for (betas, dtype) in [([0.9, 0.95], Bf16), ([0.9, 0.999], F32), ([0.995, 0.95], F32)] {
        assert_eq!(Moments::Auto.dtype(word, betas), dtype, "{betas:?}");
    }
    let error = error(&format!("precision = {{ head = 'fp8' }}\n{RANDOM}"), &[]);
    assert!(error.contains("`precision.head`") && !error.contains("or \"fp8\""), "{error}");
}

#[test]
fn the_dial_gives_the_documented_model() {
    let resolved = resolve(RANDOM, &[]);
    let config = &resolved.config;
    assert_eq!((config.hidden_size, config.num_hidden_layers, config.num_attention_heads), (192, 6, 6));
    assert_eq!(config.intermediate_size, 512);
    let FfnKind::Moe(moe) = config.ffn(1) else { panic!("experts") };
    assert_eq!((moe.n_routed_experts, moe.num_experts_per_tok, moe.moe_intermediate_size), (16, 4, 96));
    assert_eq!(config.num_nextn_predict_layers, 1);
    assert_eq!(resolved.train.optim.lr, 0.003);
    let counts = spec::parameters(config);
    assert_eq!(resolved.train.tokens, 20 * (counts.active - counts.embedding));
}

#[test]
fn every_depth_and_family_is_a_possible_model() {
    for family in Family::ALL.map(Family::model_type) {
        let mut last = 0;
        for depth in 1..=48 {
            let (family, depth) = (format!("model.family={family}"), format!("model.depth={depth}"));
            let resolved = resolve(RANDOM, &[&family, &depth]);
            let total = spec::parameters(&resolved.config).total;
            assert!(total > last, "{family} {depth}");
            last = total;
        }
    }
}

#[test]
fn derived_values_follow_given_ones() {
    let config = resolve(RANDOM, &["model.hidden_size=256", "model.v_head_dim=64"]).config;
    assert_eq!(config.num_attention_heads, 4);
    assert_eq!(config.intermediate_size, 704);
    let AttentionKind::Mla { q_lora_rank, qk_rope_head_dim, .. } = config.attention else { panic!("latent") };
    assert_eq!((q_lora_rank, qk_rope_head_dim), (None, 32));
    let deep = resolve(RANDOM, &["model.depth=16", "model.q_lora_rank=0"]).config;
    assert!(matches!(deep.attention, AttentionKind::Mla { q_lora_rank: None, .. }));
}

#[test]
fn the_bench_recipes_are_the_three_shapes() {
    let a = shipped("bench-a.toml");
    let b = shipped("bench-b.toml");
    let c = shipped("bench-c.toml");
    for (resolved, sizes, moe_sizes, latent, batch) in [
        (&a, [4096, 192, 512, 6, 6], [16, 4, 96, 1], 64, (16, 256)),
        (&b, [8192, 384, 1024, 8, 8], [32, 4, 192, 1], 128, (8, 512)),
    ] {
        let config = &resolved.config;
        assert_eq!(config.family, Family::DeepseekV3);
        let got = [
            config.vocab_size,
            config.hidden_size,
            config.intermediate_size,
            config.num_hidden_layers,
            config.num_attention_heads,
        ];
        assert_eq!(got, sizes);
        assert_eq!(config.ffn(0), FfnKind::Dense { intermediate_size: sizes[2] });
        let FfnKind::Moe(moe) = config.ffn(1) else { panic!("experts") };
        let got =
            [moe.n_routed_experts, moe.num_experts_per_tok, moe.moe_intermediate_size, moe.n_shared_experts];
        assert_eq!(got, moe_sizes);
        assert_eq!(
            (moe.n_group, moe.topk_group, moe.routed_scaling_factor, moe.norm_topk_prob),
            (1, 1, 1.0, true)
        );
        let mla = AttentionKind::Mla {
            q_lora_rank: None,
            kv_lora_rank: latent,
            qk_nope_head_dim: 32,
            qk_rope_head_dim: 16,
            v_head_dim: 32,
        };
        assert_eq!(config.attention, mla);
        assert_eq!((config.num_nextn_predict_layers, config.tie_word_embeddings), (0, false));
        assert_eq!((resolved.train.batch_size, resolved.train.sequence_length), batch);
    }
    let config = &c.config;
    assert_eq!((config.family, config.vocab_size, config.tie_word_embeddings), (Family::Llama, 8192, true));
    assert_eq!((config.hidden_size, config.num_hidden_layers, config.intermediate_size), (288, 6, 768));
    assert_eq!(config.num_attention_heads, 6);
    let bias = ProjectionBias::None;
    let gqa = AttentionKind::Gqa { num_key_value_heads: 6, head_dim: 48, bias, qk_norm: false };
    assert_eq!(config.attention, gqa);
    assert_eq!((c.train.batch_size, c.train.sequence_length), (8, 256));
    // as transformers counts the same configs; it has the routers' correction biases as buffers
    assert_eq!(spec::parameters(&a.config).total, 7_378_752 + 5 * 16);
    assert_eq!(spec::parameters(&c.config).total, 8_335_008);
    for resolved in [a, b, c] {
        assert!(resolved.data.random);
        assert_eq!(resolved.train.optim.optimizer, Optimizer::AdamW);
        assert_eq!(resolved.precision, Precision::all(Dtype::Bf16));
    }
}

#[test]
fn quickstart_and_debug_are_what_they_say() {
    let quickstart = shipped("quickstart.toml");
    let counts = spec::parameters(&quickstart.config);
    assert!((5_000_000..10_000_000).contains(&(counts.total + counts.mtp)), "{counts:?}");
    assert_eq!(quickstart.config.num_nextn_predict_layers, 1);
    assert!(quickstart.data.sources[0].path.starts_with("${CARGO_HOME"));
    let debug = shipped("debug.toml");
    assert!(Path::new(&debug.data.sources[0].path).is_absolute());
    assert!(Path::new(&debug.data.sources[0].path).join("minke-train").is_dir());
    assert!(debug.steps() >= 20);
}

#[test]
fn the_resolved_recipe_resolves_to_itself() {
    let roles =
        "[precision]\nlinear = 'bf16'\nhead = 'f32'\n[data]\nrandom = true\n[model]\nvocab_size = 512\n";
    let mut all = vec![
        resolve(
            RANDOM,
            &["model.depth=20", "model.rope_scaling={type='yarn', factor=4.0}", "run.name=a \"b\""],
        ),
        resolve(RANDOM, &["model.family=llama", "model.eos_token_id=[1,2]", "train.lr=1e-7"]),
        resolve(RANDOM, &["model.family=deepseek_v2", "precision=f32", "sample.prompts=['a\\n', \"b\\n\"]"]),
        resolve(roles, &[]),
        resolve("[[data.sources]]\npath = '/a'\n", &["data.packing=whole"]),
    ];
    let names = ["bench-a.toml", "bench-b.toml", "bench-c.toml", "quickstart.toml", "debug.toml"];
    all.extend(names.map(shipped));
    for resolved in all {
        let text = resolved.to_toml();
        let again = resolve(&text, &[]);
        assert_eq!(again.run, resolved.run);
        assert_eq!(again.depth, resolved.depth);
        assert_eq!(again.config, resolved.config, "{text}");
        assert_eq!(again.data, resolved.data);
        assert_eq!(again.train, resolved.train);
        assert_eq!(again.precision, resolved.precision);
        assert_eq!(again.sample, resolved.sample);
        let strip = |text: &str| text.replace("  # derived", "");
        assert_eq!(strip(&again.to_toml()), strip(&text));
    }
}

#[test]
fn the_resolved_recipe_shows_everything() {
    let text = "[data]\nvocab_size = 1024\n[[data.sources]]\npath = '~/notes'\nmax_bytes = '2MiB'\n";
    assert_snapshot!(resolve(text, &["run.name=notes", "train.lr=0.001"]).to_toml());
}

#[test]
fn options_are_typed_by_toml_and_words_are_strings() {
    let resolved = resolve(
        RANDOM,
        &[
            "train.lr=2",
            "train.tokens=4M",
            "run.name=bare-word",
            "data.document_borders=false",
            "train.lr = 0.5",
        ],
    );
    assert_eq!((resolved.train.optim.lr, resolved.train.tokens), (0.5, 4_000_000));
    assert_eq!(resolved.run.name, "bare-word");
    assert!(!resolved.data.document_borders);
    let text = "[[data.sources]]\npath = '/a'\n[[data.sources]]\npath = '/b'\n";
    assert_eq!(resolve(text, &["data.sources.1.path=/c"]).data.sources[1].path, "/c");
}

#[test]
fn the_vocabulary_comes_from_one_place() {
    let sources = "[[data.sources]]\npath = '/a'\n";
    let size = |text: &str, overrides: &[&str]| {
        let resolved = resolve(text, overrides);
        (resolved.config.vocab_size, resolved.data.vocab_size)
    };
    assert_eq!(size(sources, &[]), (4096, Some(4096)));
    assert_eq!(size(sources, &["data.vocab_size=1000"]), (1000, Some(1000)));
    assert_eq!(size(sources, &["model.vocab_size=2000"]), (2000, Some(2000)));
    assert_eq!(size(sources, &["data.vocab_size=1000", "model.vocab_size=1024"]), (1024, Some(1000)));
    assert_eq!(size(RANDOM, &[]), (512, None));
    let given = parse(sources, &["data.tokenizer=/t.json"]).unwrap();
    assert!(matches!(given.resolve(), Err(RecipeError::Missing { .. })));
    assert_eq!(given.resolve_with_vocabulary(777).unwrap().config.vocab_size, 777);
}

#[test]
fn messages_point_at_the_place() {
    let sources = "[[data.sources]]\npath = '/a'\n";
    let cases: [(&str, &[&str]); 36] = [
        ("[run\nname = 1", &[]),
        ("[train]\nlr = 0.1\nlr = 0.2", &[]),
        ("[trian]\nlr = 0.1\n", &[]),
        ("[train]\n\tlr = 0.1\n\twarmup_shar = 0.1 # a comment\n", &[]),
        ("[model]\nfamily = 'llama'\nn_routed_experts = 8\n", &[]),
        ("[train]\nlr = 'fast'\n", &[]),
        ("[train]\nbatch_size = 0\n", &[]),
        ("[train]\ntokens = '4 apples'\n", &[]),
        ("[train]\nbetas = [0.9, 1.5]\n", &[]),
        ("[train]\nbetas = [0.9, 0.999]\nmoments = 'bf16'\n", &[]),
        ("[train]\noptimizer = 'sgd'\n", &[]),
        ("[train]\nseed = 1\n", &[]),
        ("train = 3\n", &[]),
        ("precision = 'fp4'\n[data]\nrandom = true\n", &[]),
        ("[precision]\nlinaer = 'bf16'\n", &[]),
        ("[data]\nvalidation_share = 0.9\nrandom = true\n", &[]),
        ("[run]\nname = 'é'\nseed = -1 # ü\n", &[]),
        ("", &[]),
        ("[data]\nrandom = true\n", &[]),
        ("[data]\nrandom = true\nvocab_size = 512\n", &[]),
        ("[data]\nsources = [{ path = '/a', pth = '/b' }]\n", &[]),
        (sources, &["model.vocab_size=4095", "data.vocab_size=4096"]),
        (RANDOM, &["model.num_experts_per_tok=17"]),
        (RANDOM, &["model.n_group=5"]),
        (RANDOM, &["model.family=llama", "model.hidden_size=100"]),
        (RANDOM, &["model.hidden_size=wide"]),
        (RANDOM, &["train.sequence_length=2"]),
        (RANDOM, &["train.tokens=1000"]),
        (RANDOM, &["train.lrr=0.1"]),
        (sources, &["data.packing=half"]),
        (sources, &["data.packing=whole", "data.document_borders=false"]),
        (RANDOM, &["data.packing=whole"]),
        ("[train]\nbetas = [0.995, 0.95]\nmoments = 'bf16'\n", &[]),
        ("[train]\neps = 1e-60\n", &[]),
        ("[train]\nbias_update_speed = 1e300\n", &[]),
        ("[train]\nbetas = [0.9, 0.999999999]\n", &[]),
    ];
    let text: Vec<String> = cases.iter().map(|(text, overrides)| error(text, overrides)).collect();
    assert_snapshot!(text.join("\n\n"));
}

#[test]
fn options_that_cannot_be_applied_say_so() {
    let options = [
        "train.lr",
        "=1",
        "train..lr=1",
        "model.eos_token_id=[1,",
        "train.lr.peak=1",
        "train.lr.shape.kind=steep",
        "data.sources.7.path=x",
    ];
    let text = format!("{RANDOM}sources = []\n[train]\nlr = 0.1\n");
    let text: Vec<String> = options.iter().map(|option| error(&text, &[option])).collect();
    assert_snapshot!(text.join("\n"));
}

#[test]
fn paths_start_where_they_are_said() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("r.toml");
    let text = "[run]\nbaseline = \"old\"\n[[data.sources]]\npath = \"texts\"\n";
    std::fs::write(&path, text).unwrap();
    let paths = |overrides: &[&str]| {
        let overrides: Vec<String> = overrides.iter().map(|&text| text.to_owned()).collect();
        let recipe = Recipe::load(&path, &overrides).unwrap();
        [&recipe.baseline, &recipe.data.tokenizer, &Some(recipe.data.sources[0].path.clone())]
            .map(Clone::clone)
    };
    let beside = |name: &str| Some(folder.path().join(name).display().to_string());
    let here = |name: &str| Some(std::path::absolute(name).unwrap().display().to_string());
    assert_eq!(paths(&[]), [beside("old"), None, beside("texts")]);
    let set = ["run.baseline=runs/a", "data.tokenizer=./t", "data.sources=[{ path = '../x' }]"];
    assert_eq!(paths(&set), [here("runs/a"), here("t"), here("../x")]);
    assert_eq!(paths(&["data.sources.0.path=/x", "run.baseline=~/a"])[2], Some("/x".to_owned()));
}

#[test]
fn recipes_of_other_commands_are_told() {
    let told = |text: &str, command| {
        Document::parse("r.toml", text, &[]).unwrap().is_for(command).err().map(|error| error.to_string())
    };
    let sft = "[model]\npath = 'm'\n[[data.sources]]\npath = 'x'\n";
    let sample = "[model]\npath = 'm'\n[tasks]\nsuite = 'core'\n";
    assert_snapshot!([
        told("[[stage]]\nname = 'a'\n", "pretrain"),
        told(sft, "pretrain"),
        told(RANDOM, "make"),
        told(sample, "sft"),
    ]
    .map(Option::unwrap)
    .join("\n"), @r"
    r.toml is a recipe for `minke make`: expected one for `minke pretrain`
    r.toml is a recipe for `minke sft`: expected one for `minke pretrain`
    r.toml is a recipe for `minke pretrain` or `minke sft` or `minke distill`: expected one for `minke make`
    r.toml is a recipe for `minke grpo` or `minke sample`: expected one for `minke sft`
    ");
    for (text, command) in
        [(RANDOM, "pretrain"), (sft, "sft"), (sample, "sample"), (sample, "grpo"), ("", "make")]
    {
        assert_eq!(told(text, command), None, "{text}");
    }
    // what is of no kind is for its reader to judge
    assert_eq!(told("[[stage]]\n[teacher]\n", "sft"), None);
}

#[test]
fn a_name_is_no_way_out_of_the_folder_of_runs() {
    let run = |name: &str, more: &str, out: Option<&Path>| {
        let text = format!("[run]\nname = {name:?}\n{more}{RANDOM}");
        let document = Document::parse("r.toml", &text, &[]).unwrap().written_to(out);
        Recipe::read(&document).map(|recipe| recipe.run().out.clone()).map_err(|error| error.to_string())
    };
    for name in ["../../elsewhere", "a/b", "..", "a\\b", "/tmp/a"] {
        let error = run(name, "", None).unwrap_err();
        assert!(error.contains("`run.name`") && error.contains("run.out"), "{error}");
        assert_eq!(run(name, "out = \"there\"\n", None).unwrap(), "there");
        assert_eq!(run(name, "", Some(Path::new("here"))).unwrap(), "here");
    }
    assert_eq!(run("a.b-c", "", None).unwrap(), "runs/a.b-c");
    assert_eq!(run("a", "out = \"there\"\n", Some(Path::new("here"))).unwrap(), "here");
}

#[test]
fn files_that_are_no_recipes_say_so() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("r.toml");
    let message = |path: &Path| {
        Recipe::load(path, &[])
            .unwrap_err()
            .to_string()
            .replace(&folder.path().display().to_string(), "FOLDER")
    };
    let missing = message(&path);
    std::fs::write(&path, b"[run]\nname = '\xff'\n").unwrap();
    let binary = message(&path);
    std::fs::write(&path, vec![b'#'; document::MAX_BYTES as usize + 1]).unwrap();
    let long = message(&path);
    assert_snapshot!([missing, binary, long].join("\n"));
}

#[test]
fn no_text_makes_it_panic() {
    let base = shipped("quickstart.toml").to_toml();
    let hostile = [
        "-1",
        "0",
        "1e999",
        "nan",
        "99999999999999999999999",
        "''",
        "[]",
        "{}",
        "true",
        "1979-05-27",
        "[[[]]]",
    ];
    for line in base.lines().filter(|line| line.contains(" = ")) {
        let key = line.split(" = ").next().unwrap();
        for value in hostile {
            let changed = base.replacen(line, &format!("{key} = {value}"), 1);
            let _ =
                parse(&changed, &[]).and_then(|recipe| recipe.resolve()).map(|resolved| resolved.to_toml());
        }
    }
    // cut anywhere, also within a character
    let text = format!("{base}# é\n");
    for cut in (0..text.len()).filter(|cut| text.is_char_boundary(*cut)) {
        let _ = parse(&text[..cut], &[]).map_err(|error| error.to_string());
    }
}
