//! Every example of this file's list runs, and says what it should.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

/// Runs an example that cargo has built beside this test, at most five minutes.
fn run(name: &str, arguments: &[&str]) -> Output {
    // target/debug/deps/examples-… → target/debug/examples/name
    let this = std::env::current_exe().unwrap();
    let program: PathBuf = this.parent().and_then(Path::parent).unwrap().join("examples").join(name);
    let mut child = Command::new(&program)
        .args(arguments)
        // The same numbers on any number of cores.
        .env("OMP_NUM_THREADS", "1")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|e| {
            panic!(
                "{}: {e} (cargo test builds examples; cargo test --test examples does not)",
                program.display()
            )
        });
    let id = child.id();
    let (done, ended) = std::sync::mpsc::channel::<()>();
    let watchdog = std::thread::spawn(move || {
        let start = Instant::now();
        while ended.recv_timeout(Duration::from_millis(100)).is_err() {
            if start.elapsed() > Duration::from_secs(300) {
                let _ = Command::new("kill").arg(id.to_string()).status();
                return;
            }
        }
    });
    let _ = child.stdin.take();
    let output = child.wait_with_output().unwrap();
    let _ = done.send(());
    watchdog.join().unwrap();
    output
}

/// What a successful example prints.
fn said(name: &str, arguments: &[&str]) -> String {
    let output = run(name, arguments);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{name}: {text}\n{}", String::from_utf8_lossy(&output.stderr));
    text
}

#[test]
fn one_rank_with_nccl_is_a_group_or_an_error_that_says_why_not() {
    let text = said("init_nccl_single", &[]);
    assert!(
        text.contains("rank 0 of 1") || text.contains("no NCCL here: backend nccl is not available"),
        "{text}"
    );
}

#[test]
fn ranks_know_who_they_are_from_the_environment() {
    let text = said("init_from_env", &[]);
    assert!(text.contains("rank 0 of 2") && text.contains("rank 1 of 2"), "{text}");
}

#[test]
fn mistakes_say_what_to_do() {
    let text = said("errors", &[]);
    let lines: Vec<&str> = text.lines().collect();
    assert!(lines[0].contains("init_process_group"), "{text}");
    assert!(lines[1].contains("world_size") && lines[1].contains("WORLD_SIZE"), "{text}");
}

#[test]
fn gathered_gradients_train_the_same_weight_on_every_rank_in_batches_over_workers_steps() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("steps").display().to_string();
    // It asserts itself that the steps it counts are those it expects.
    let text = said("train_gather_update", &["--nproc", "3", "--batches", "12", "--out", &out]);
    for rank in 0..3 {
        assert!(text.contains(&format!("rank {rank}: the weight is 3.000")), "{text}");
    }
    assert!(text.contains("expected: steps grow as batches, and shrink as 1 / workers"), "{text}");
    for picture in ["steps_batches.svg", "steps_workers.png"] {
        assert!(std::fs::metadata(folder.path().join(picture)).unwrap().len() > 0, "{picture}");
    }
}

#[test]
fn digits_are_learnt_and_a_resumed_run_ends_as_one_that_never_stopped() {
    let folder = tempfile::tempdir().unwrap();
    let out = |name: &str| folder.path().join(name).display().to_string();
    let train = |name: &str, epochs: &str, more: &[&str]| {
        let out = out(name);
        said("train_digits", &[&["--nproc", "2", "--out", &out, "--epochs", epochs], more].concat())
    };
    let text = train("straight", "3", &[]);
    assert!(text.contains("epoch   3/3"), "{text}");
    let accuracy = text.lines().find_map(|line| line.strip_prefix("held-out accuracy: ")).unwrap();
    let accuracy: f64 = accuracy.strip_suffix(" %").unwrap().parse().unwrap();
    assert!(accuracy > 85.0, "{text}");
    train("stopped", "1", &[]);
    train("stopped", "3", &["--resume"]);
    for file in ["model.safetensors", "checkpoint.safetensors", "loss.svg"] {
        let read = |name: &str| std::fs::read(folder.path().join(name).join(file)).unwrap();
        assert!(read("straight") == read("stopped"), "{file} differs");
    }
}

#[test]
fn a_backend_of_our_own_compresses_around_the_native_one() {
    let text = said("custom_backend", &[]);
    assert!(text.contains("all_reduce(Sum) of 8 bytes of Float"), "{text}");
    assert!(text.ends_with("a backend of our own summed in bf16 on three ranks\n"), "{text}");
}

#[test]
fn aggregated_metrics_and_a_spread_fleet_are_those_of_one_process() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("picture").display().to_string();
    // Both assert themselves that the figures agree and that the work grows as they say.
    let text = said("aggregate_metrics", &["--nproc", "3", "--batches", "8", "--out", &out]);
    assert!(text.contains("expected: time grows as batches"), "{text}");
    let text = said("update_fleet", &["--nproc", "2", "--models", "4", "--batches", "4", "--out", &out]);
    assert!(text.contains("expected: work grows as models × batches"), "{text}");
    assert!(std::fs::read_to_string(folder.path().join("picture.svg")).unwrap().contains("models"));
    assert!(std::fs::metadata(folder.path().join("picture.png")).unwrap().len() > 0);
}

#[test]
fn a_rank_that_is_slowed_on_purpose_is_named_by_the_summary_and_seen_in_the_trace() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().display().to_string();
    let slow = ["--nproc", "3", "--slow-rank", "1", "--slow-ms", "600", "--steps", "4", "--out", &out];
    let text = said("profile_training", &slow);
    assert!(text.contains("slowest: rank 1, for which others waited"), "{text}");
    let trace = std::fs::read(folder.path().join("trace.json")).unwrap();
    let trace: serde_json::Value = serde_json::from_slice(&trace).unwrap();
    let events = trace["traceEvents"].as_array().unwrap();
    for rank in 0..3 {
        let steps = events.iter().filter(|e| e["name"] == "step" && e["pid"] == rank).count();
        assert_eq!(steps, 4, "rank {rank}");
    }
}

#[test]
fn the_scaling_report_says_where_more_workers_hurt() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("scaling").display().to_string();
    let text = said(
        "scaling_report",
        &["--nproc", "2", "--rounds", "1", "--steps", "1", "--width", "64", "--batch", "64", "--out", &out],
    );
    assert!(text.contains("one more makes the step longer"), "{text}");
}

#[test]
fn a_gpt_trains_alike_on_every_mesh_and_says_its_loss_last() {
    let folder = tempfile::tempdir().unwrap();
    let train = |name: &str, mesh: &[&str]| -> Vec<f64> {
        let out = folder.path().join(name).display().to_string();
        let small = ["--steps", "3", "--batch", "8", "--context", "16", "--width", "16", "--layers", "4"];
        let text = said(
            "train_gpt",
            &[&small[..], &["--heads", "2", "--sample", "8", "--out", &out], mesh].concat(),
        );
        let losses = std::fs::read_to_string(folder.path().join(name).join("losses.txt")).unwrap();
        let losses: Vec<f64> = losses.lines().map(|line| line.parse().unwrap()).collect();
        assert_eq!(losses.len(), 3, "{text}");
        assert_eq!(text.lines().last().unwrap(), format!("final loss: {:.3}", losses[2]));
        for picture in ["loss.svg", "loss.png", "last_step.svg"] {
            assert!(
                std::fs::metadata(folder.path().join(name).join(picture)).unwrap().len() > 0,
                "{picture}"
            );
        }
        losses
    };
    let alone = train("alone", &["--dp", "1", "--tp", "1", "--pp", "1"]);
    let meshes: [(&str, &[&str]); 2] = [
        ("data, tensor and pipeline", &["--dp", "2", "--tp", "2", "--pp", "2"]),
        ("tensor and pipeline", &["--tp", "2", "--pp", "2", "--sp", "--schedule", "interleaved"]),
    ];
    for (name, mesh) in meshes {
        for (got, expected) in train(name, mesh).iter().zip(&alone) {
            assert!((got - expected).abs() < 1e-4 * expected, "{name}: {got}, alone {expected}");
        }
    }
}

#[test]
fn every_way_to_be_parallel_is_compared() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().display().to_string();
    let text = said(
        "compare_parallelism",
        &["--quick", "--workers", "2", "--steps", "1", "--layers", "2", "--out", &out],
    );
    for way in ["data", "tensor", "pipeline"] {
        assert!(text.contains(way), "{text}");
    }
}

#[test]
fn schedules_hold_what_their_plans_say() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().display().to_string();
    let small = ["--micro-batches", "8", "--layers", "2", "--width", "16", "--rows", "4", "--out", &out];
    // It asserts itself that a rank holds as many micro-batches as planned.
    let text = said("compare_schedules", &small);
    for schedule in ["gpipe", "1f1b", "interleaved", "zero-bubble"] {
        assert!(text.contains(schedule), "{text}");
        let svg = std::fs::read_to_string(folder.path().join(format!("{schedule}_8.svg"))).unwrap();
        assert!(svg.contains("bubble") && svg.contains("time ("), "{schedule}");
    }
    assert!(std::fs::metadata(folder.path().join("memory.png")).unwrap().len() > 0);
}

#[test]
fn no_example_is_left_out_here() {
    // This one wants PyTorch on the other side: `cargo xtask interop` runs it.
    let elsewhere = ["interop"];
    for entry in std::fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("examples")).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_stem().unwrap().to_str().unwrap().to_owned();
        let is_example = path.extension().is_some_and(|e| e == "rs") || path.join("main.rs").exists();
        if is_example && !elsewhere.contains(&name.as_str()) {
            assert!(
                include_str!("examples.rs").contains(&format!("\"{name}\"")),
                "no test runs the example {name}"
            );
        }
    }
}
