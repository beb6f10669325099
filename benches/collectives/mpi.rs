//! The MPIs of this machine, where there are any: a small program in C, compiled on the spot.
//!
//! MPI's ranks spin while they wait, so they cannot wait for their turn: they are started for each case of each
//! round, and their first runs do not count.

use std::path::PathBuf;
use std::process::{Command, Stdio};

use tch::Kind;

use super::cases::{Case, Collective};
use super::crew::Times;

const SOURCE: &str = include_str!("mpi.c");

/// Whose MPI.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Flavour {
    OpenMpi,
    Mpich,
}

impl Flavour {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::OpenMpi => "openmpi",
            Self::Mpich => "mpich",
        }
    }

    /// Its compiler and its launcher: those of its name, as Debian calls them where there are several, or those
    /// without, if they are of this flavour.
    fn tools(self) -> Option<(String, String)> {
        let named = |tool: &str| format!("{tool}.{}", self.name());
        let plain = |tool: &str| tool.to_owned();
        let says = match self {
            Self::OpenMpi => ["Open MPI", "OpenRTE"],
            Self::Mpich => ["HYDRA", "MPICH"],
        };
        [(named("mpicc"), named("mpirun")), (plain("mpicc"), plain("mpirun"))].into_iter().find(|(_, run)| {
            Command::new(run).arg("--version").output().is_ok_and(|output| {
                let text = String::from_utf8_lossy(&output.stdout);
                says.iter().any(|word| text.contains(word))
            })
        })
    }
}

pub(crate) struct Mpi {
    flavour: Flavour,
    launcher: String,
    program: PathBuf,
    world: usize,
}

/// Whether it is compared in this.
pub(crate) fn does(case: &Case) -> bool {
    let rooted = [Collective::Reduce, Collective::Gather, Collective::Scatter];
    case.kind == Kind::Float && !rooted.contains(&case.collective)
}

impl Mpi {
    /// Compiles the program.
    pub(crate) fn new(flavour: Flavour, world: usize) -> Result<Self, String> {
        let name = flavour.name();
        let (compiler, launcher) = flavour.tools().ok_or_else(|| format!("there is no {name}"))?;
        let folder = std::env::temp_dir().join(format!("tch-distributed-{name}-{}", std::process::id()));
        let (source, program) = (folder.join("mpi.c"), folder.join("mpi"));
        std::fs::create_dir_all(&folder)
            .and_then(|()| std::fs::write(&source, SOURCE))
            .map_err(|e| e.to_string())?;
        let compiled = Command::new(&compiler).args(["-O3", "-o"]).args([&program, &source]).output();
        match compiled {
            Ok(output) if output.status.success() => Ok(Self { flavour, launcher, program, world }),
            Ok(output) => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
            Err(e) => Err(format!("{compiler}: {e}")),
        }
    }

    pub(crate) fn run(&self, case: &Case, iterations: usize) -> Result<Times, String> {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let mut command = Command::new(&self.launcher);
        command.args(["-n", &self.world.to_string()]);
        match self.flavour {
            Flavour::OpenMpi => {
                command.envs([("OMPI_ALLOW_RUN_AS_ROOT", "1"), ("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")]);
                if self.world > cores {
                    command.env("OMPI_MCA_rmaps_base_oversubscribe", "1");
                    command.env("OMPI_MCA_mpi_yield_when_idle", "1");
                }
            }
            // The other one does it by itself.
            Flavour::Mpich if self.world <= cores => {
                command.args(["-bind-to", "core"]);
            }
            Flavour::Mpich => {}
        }
        command.arg(&self.program).args([
            case.collective.name(),
            &case.bytes.to_string(),
            &iterations.to_string(),
        ]);
        let output = command.stdin(Stdio::null()).output().map_err(|e| format!("{}: {e}", self.launcher))?;
        let text = String::from_utf8_lossy(&output.stdout);
        let line = text.lines().find_map(|line| line.strip_prefix("times "));
        let numbers: Option<Vec<f64>> =
            line.and_then(|line| line.split(' ').map(|n| n.parse().ok()).collect());
        match numbers.as_deref() {
            Some([wrong, nanos @ ..]) if output.status.success() => {
                Ok(Times { micros: nanos.iter().map(|n| n / 1000.0).collect(), wrong: *wrong as u64 })
            }
            _ => Err(format!("{}: {}", output.status, String::from_utf8_lossy(&output.stderr))),
        }
    }
}

impl Drop for Mpi {
    fn drop(&mut self) {
        if let Some(folder) = self.program.parent() {
            let _ = std::fs::remove_dir_all(folder);
        }
    }
}
