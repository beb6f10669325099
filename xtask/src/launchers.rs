//! The digits example, started as a rank by each of the launchers that clusters have: PyTorch's `torchrun`, Open MPI's
//! `mpirun`, and Slurm, whose variables are set here as `srun` sets them.
//!
//! However its two ranks come to be, they train the same model, to the bit.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};

use crate::crew::{Crew, free_port};

/// Two ranks of the example; a short run.
struct Digits<'a> {
    program: &'a Path,
    /// Where this run leaves its model.
    out: PathBuf,
}

impl Digits<'_> {
    /// What to add to a launcher's command line.
    fn append<'c>(&self, command: &'c mut Command) -> &'c mut Command {
        // No --nproc: torchrun takes it for one of its own, wherever it stands.
        command.arg(self.program).args(["--epochs", "2", "--out"]).arg(&self.out)
    }

    fn model(&self) -> Result<Vec<u8>> {
        let path = self.out.join("model.safetensors");
        fs::read(&path).with_context(|| format!("there is no model in {}", path.display()))
    }
}

type Start = fn(&Digits<'_>, &Path) -> Result<Vec<Command>>;

const LAUNCHERS: [(&str, Start); 5] = [
    ("local(2)", itself),
    ("torchrun, one node", torchrun),
    ("torchrun, two agents", torchrun_twice),
    ("mpirun", mpirun),
    ("Slurm's variables", slurm),
];

/// Runs the example under each; `bin` is where PyTorch's programs are.
pub(crate) fn run(program: &Path, bin: &Path, folder: &Path) -> Result<()> {
    let mut first: Option<Vec<u8>> = None;
    for (index, (name, start)) in LAUNCHERS.iter().enumerate() {
        let digits = Digits { program, out: folder.join(index.to_string()) };
        let mut crew = Crew::default();
        for mut command in start(&digits, bin)? {
            // One thread a rank: sums are then in one order everywhere.
            command.env("OMP_NUM_THREADS", "1").stdin(Stdio::null());
            crew.start(&mut command)?;
        }
        let took = crew.wait().with_context(|| format!("the digits example failed under {name}"))?;
        let model = digits.model().with_context(|| format!("under {name}"))?;
        match &first {
            None => first = Some(model),
            Some(first) => ensure!(*first == model, "under {name} two ranks trained another model"),
        }
        println!("{name:<22} two ranks train the same model, {:.1} s", took.as_secs_f64());
    }
    Ok(())
}

fn itself(digits: &Digits<'_>, _: &Path) -> Result<Vec<Command>> {
    let mut command = Command::new(digits.program);
    command.args(["--nproc", "2", "--epochs", "2", "--out"]).arg(&digits.out);
    Ok(vec![command])
}

fn torchrun_with(bin: &Path) -> Command {
    let mut command = Command::new(bin.join("torchrun"));
    // Ours is a libtorch without CUDA; PyTorch finds its own.
    command.env_remove("LD_LIBRARY_PATH");
    command
}

fn torchrun(digits: &Digits<'_>, bin: &Path) -> Result<Vec<Command>> {
    let mut command = torchrun_with(bin);
    command.args(["--standalone", "--nproc-per-node", "2", "--no-python"]);
    digits.append(&mut command);
    Ok(vec![command])
}

fn torchrun_twice(digits: &Digits<'_>, bin: &Path) -> Result<Vec<Command>> {
    let endpoint = format!("127.0.0.1:{}", free_port()?);
    let agent = || {
        let mut command = torchrun_with(bin);
        command
            .args(["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d"])
            .args(["--rdzv-id", "digits", "--rdzv-endpoint", &endpoint])
            .args(["--local-addr", "127.0.0.1", "--no-python"]);
        digits.append(&mut command);
        command
    };
    Ok(vec![agent(), agent()])
}

fn mpirun(digits: &Digits<'_>, _: &Path) -> Result<Vec<Command>> {
    let version = Command::new("mpirun").arg("--version").output();
    if !version.is_ok_and(|output| String::from_utf8_lossy(&output.stdout).contains("Open MPI")) {
        bail!("Open MPI's mpirun is not on the PATH: install it (`apt-get install openmpi-bin`)");
    }
    let mut command = Command::new("mpirun");
    command.args(["--allow-run-as-root", "--oversubscribe", "-n", "2"]);
    digits.append(&mut command);
    Ok(vec![command])
}

fn slurm(digits: &Digits<'_>, _: &Path) -> Result<Vec<Command>> {
    let task = |rank: usize| {
        let mut command = Command::new("env");
        digits.append(&mut command);
        for (name, value) in slurms_variables(rank, 2) {
            command.env(name, value);
        }
        command
    };
    Ok((0..2).map(task).collect())
}

/// As `srun` sets them for a step of one node.
fn slurms_variables(rank: usize, size: usize) -> Vec<(&'static str, String)> {
    vec![
        ("SLURM_PROCID", rank.to_string()),
        ("SLURM_LOCALID", rank.to_string()),
        ("SLURM_NODEID", "0".to_owned()),
        ("SLURM_NTASKS", size.to_string()),
        ("SLURM_STEP_NUM_TASKS", size.to_string()),
        ("SLURM_JOB_ID", std::process::id().to_string()),
        ("SLURM_STEP_ID", "0".to_owned()),
        ("SLURM_STEP_NODELIST", "localhost".to_owned()),
        ("SLURM_JOB_NODELIST", "localhost".to_owned()),
        ("SLURM_LAUNCH_NODE_IPADDR", "127.0.0.1".to_owned()),
    ]
}
