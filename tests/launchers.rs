//! The digits example under the variables that Open MPI's `mpirun` and Slurm's `srun` set. (`cargo xtask interop` starts
//! it by PyTorch's own `torchrun` and by a real `mpirun` too, where they are installed.)

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const LIMIT: Duration = Duration::from_secs(120);

/// The digits example, which cargo has built beside this test; a short run that leaves its model in `out`.
fn digits(out: &Path, ranks: &str) -> Command {
    let this = std::env::current_exe().unwrap();
    let program = this.parent().and_then(Path::parent).unwrap().join("examples/train_digits");
    assert!(program.is_file(), "cargo test builds examples; cargo test --test launchers does not");
    let mut command = Command::new(program);
    command.args(["--nproc", ranks, "--epochs", "1", "--out"]).arg(out);
    for name in ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"] {
        command.env_remove(name);
    }
    // One thread a rank: sums are then in one order everywhere.
    command.env("OMP_NUM_THREADS", "1").stdin(Stdio::null()).stdout(Stdio::piped());
    command
}

/// Waits for all, which end well; what they print.
fn finish(commands: Vec<Command>) -> String {
    let mut children: Vec<Child> = commands.into_iter().map(|mut command| command.spawn().unwrap()).collect();
    let start = Instant::now();
    while children.iter_mut().any(|child| child.try_wait().unwrap().is_none()) {
        if start.elapsed() > LIMIT {
            children.iter_mut().for_each(|child| drop(child.kill()));
            panic!("not done after {LIMIT:?}");
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    let mut text = String::new();
    for child in children {
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{:?}", output.status);
        text += &String::from_utf8(output.stdout).unwrap();
    }
    text
}

fn model(out: &Path) -> Vec<u8> {
    std::fs::read(out.join("model.safetensors")).unwrap()
}

/// Two ranks started by hand with `variables` train, to the bit, what the program's own two ranks train, and
/// rank 0 alone reports.
fn trains_as_alone(variables: impl Fn(usize) -> Vec<(&'static str, String)>) {
    let folder = tempfile::tempdir().unwrap();
    let places: [PathBuf; 2] = ["alone", "launched"].map(|name| folder.path().join(name));
    finish(vec![digits(&places[0], "2")]);
    let rank = |rank: usize| {
        // The launcher's number of ranks holds, not the argument.
        let mut command = digits(&places[1], "7");
        command.envs(variables(rank));
        command
    };
    let text = finish(vec![rank(0), rank(1)]);
    assert_eq!(text.matches("held-out accuracy:").count(), 1, "{text}");
    assert!(model(&places[0]) == model(&places[1]), "another model");
}

#[test]
fn ranks_with_slurms_variables_train_the_same_model_as_those_that_the_program_starts() {
    // One step of one node: as srun sets them.
    trains_as_alone(|rank| {
        vec![
            ("SLURM_PROCID", rank.to_string()),
            ("SLURM_LOCALID", rank.to_string()),
            ("SLURM_NODEID", "0".to_owned()),
            ("SLURM_NTASKS", "2".to_owned()),
            ("SLURM_STEP_NUM_TASKS", "2".to_owned()),
            ("SLURM_JOB_ID", std::process::id().to_string()),
            ("SLURM_STEP_ID", "0".to_owned()),
            ("SLURM_STEP_NODELIST", "localhost".to_owned()),
            ("SLURM_LAUNCH_NODE_IPADDR", "127.0.0.1".to_owned()),
        ]
    });
}

#[test]
fn ranks_with_open_mpis_variables_train_the_same_model_as_those_that_the_program_starts() {
    trains_as_alone(|rank| {
        vec![
            ("OMPI_COMM_WORLD_RANK", rank.to_string()),
            ("OMPI_COMM_WORLD_SIZE", "2".to_owned()),
            ("OMPI_COMM_WORLD_LOCAL_RANK", rank.to_string()),
            ("OMPI_COMM_WORLD_LOCAL_SIZE", "2".to_owned()),
            ("PMIX_NAMESPACE", format!("{}", std::process::id())),
        ]
    });
}
