//! The parent's side of a crew: the ranks of one engine, which wait without work while others run.

use std::fmt;
use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::time::Duration;

use tch_distributed as dist;

use super::cases::Case;
use super::mpi::{self, Flavour, Mpi};
use super::report::median;
use super::training::Mode;
use super::{member, model};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Engine {
    SharedMemory,
    /// The same on tensors that the engine has allocated.
    Allocated,
    Tcp,
    Threads,
    Gloo,
    /// What a good implementation reaches, without the rest of one.
    Model,
    Mpi(Flavour),
}

pub(crate) const ENGINES: [Engine; 8] = [
    Engine::SharedMemory,
    Engine::Allocated,
    Engine::Tcp,
    Engine::Threads,
    Engine::Gloo,
    Engine::Model,
    Engine::Mpi(Flavour::OpenMpi),
    Engine::Mpi(Flavour::Mpich),
];

impl Engine {
    /// Engine and transport.
    pub(crate) fn names(self) -> (&'static str, &'static str) {
        match self {
            Self::SharedMemory => ("native", "shm"),
            Self::Tcp => ("native", "tcp"),
            Self::Threads => ("native", "threads"),
            Self::Allocated => ("native", "shm-allocated"),
            Self::Gloo => ("gloo", "tcp"),
            Self::Model => ("model", "staged"),
            Self::Mpi(flavour) => (flavour.name(), "shm"),
        }
    }

    /// Whether it can do this.
    pub(crate) fn does(self, case: &Case) -> bool {
        match self {
            Self::Model => model::does(case),
            Self::Mpi(_) => mpi::does(case),
            Self::Allocated => case.bytes > 0,
            _ => true,
        }
    }

    /// Whether it has process groups, to train with.
    pub(crate) fn trains(self) -> bool {
        !matches!(self, Self::Model | Self::Mpi(_))
    }
}

impl fmt::Display for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (engine, transport) = self.names();
        write!(f, "{engine}/{transport}")
    }
}

/// How long one command may take.
const PATIENCE: Duration = Duration::from_secs(120);

pub(crate) struct Crew {
    pub(crate) engine: Engine,
    world: usize,
    members: Vec<(Child, Option<ChildStdin>)>,
    answers: Receiver<String>,
    /// Instead of members.
    mpi: Option<Mpi>,
}

/// What all ranks measured: for each iteration the slowest.
pub(crate) struct Times {
    pub(crate) micros: Vec<f64>,
    pub(crate) wrong: u64,
}

impl Crew {
    pub(crate) fn start(engine: Engine, world: usize, pin: bool) -> Result<Self, String> {
        let (backend, transport) = engine.names();
        let (sender, answers) = mpsc::channel();
        let mut crew = Self { engine, world, members: Vec::new(), answers, mpi: None };
        if let Engine::Mpi(flavour) = engine {
            crew.mpi = Some(Mpi::new(flavour, world)?);
            return Ok(crew);
        }
        if engine != Engine::Model && !dist::is_backend_available(backend) {
            return Err(format!("{backend} is not available"));
        }
        let program = std::env::current_exe().map_err(|e| e.to_string())?;
        // Free a moment ago; nobody else asks for ports here.
        let port =
            TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).map_err(|e| e.to_string())?.port();
        let processes = if matches!(engine, Engine::Threads | Engine::Model) { 1 } else { world };
        for rank in 0..processes {
            let mut command = Command::new(&program);
            command.args([member::COMMAND, backend]);
            match engine {
                Engine::Threads | Engine::Model => {
                    command.arg(world.to_string());
                }
                Engine::Allocated => {
                    command.env("TCH_DISTRIBUTED_TRANSPORT", "shm").env(member::ALLOCATE, "1");
                }
                Engine::Gloo | Engine::Mpi(_) => {}
                Engine::SharedMemory | Engine::Tcp => {
                    command.env("TCH_DISTRIBUTED_TRANSPORT", transport);
                }
            }
            // Gloo's own threads would share the core of their rank.
            if pin && engine != Engine::Gloo {
                command.env(member::PIN, "1");
            }
            if engine == Engine::Gloo {
                command.env("GLOO_SOCKET_IFNAME", "lo");
            }
            let mut child = command
                .envs([("RANK", rank.to_string()), ("LOCAL_RANK", rank.to_string())])
                .envs([("WORLD_SIZE", world.to_string()), ("MASTER_PORT", port.to_string())])
                .env("MASTER_ADDR", "127.0.0.1")
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()
                .map_err(|e| e.to_string())?;
            let stdin = child.stdin.take();
            if let Some(stdout) = child.stdout.take() {
                let sender = sender.clone();
                std::thread::spawn(move || {
                    for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                        if sender.send(line).is_err() {
                            return;
                        }
                    }
                    let _ = sender.send("error a rank ended".to_owned());
                });
            }
            crew.members.push((child, stdin));
        }
        for _ in 0..world {
            crew.answer()?;
        }
        Ok(crew)
    }

    fn answer(&self) -> Result<String, String> {
        match self.answers.recv_timeout(PATIENCE) {
            Ok(line) => match line.strip_prefix("error ") {
                Some(reason) => Err(reason.to_owned()),
                None => Ok(line),
            },
            Err(_) => Err(format!("no answer in {PATIENCE:?}")),
        }
    }

    /// Runs a case so many times.
    pub(crate) fn run(&mut self, case: &Case, iterations: usize) -> Result<Times, String> {
        if let Some(mpi) = &self.mpi {
            return mpi.run(case, iterations);
        }
        let answers = self.ask(&format!("{iterations} {}", case.words()))?;
        let mut times = Self::slowest(&answers, 0)?;
        if self.engine == Engine::Model {
            // It has tried several sizes of slots: the best counts.
            let ways = times.micros.chunks(iterations.max(1));
            let best = ways.min_by(|a, b| median(a).total_cmp(&median(b)));
            times.micros = best.unwrap_or_default().to_vec();
        }
        Ok(times)
    }

    /// Makes so many steps of training, and says how many bytes are exchanged in each.
    pub(crate) fn train(&mut self, model: &str, mode: Mode, steps: usize) -> Result<(Times, usize), String> {
        let answers = self.ask(&format!("{steps} train {model} {}", mode.name()))?;
        let bytes = answers.first().and_then(|a| a.get(1)).copied().unwrap_or_default();
        Ok((Self::slowest(&answers, 1)?, bytes as usize))
    }

    /// Sends all ranks a command; each answers with numbers, of which the first is its own.
    fn ask(&mut self, command: &str) -> Result<Vec<Vec<u64>>, String> {
        for (_, stdin) in &mut self.members {
            let Some(stdin) = stdin else { continue };
            writeln!(stdin, "{command}").map_err(|e| e.to_string())?;
        }
        (0..self.world)
            .map(|_| {
                let line = self.answer()?;
                let numbers: Result<_, _> = line.split(' ').skip(1).map(str::parse).collect();
                numbers.map_err(|_| format!("answered {line:?}"))
            })
            .collect()
    }

    /// For each iteration the slowest rank; after the count of wrong results come `extra` numbers.
    fn slowest(answers: &[Vec<u64>], extra: usize) -> Result<Times, String> {
        let wrong = answers.iter().filter_map(|a| a.first()).sum();
        let times: Vec<&[u64]> = answers.iter().filter_map(|a| a.get(1 + extra..)).collect();
        let iterations = times.iter().map(|t| t.len()).min().ok_or("nobody answered")?;
        let slowest = |n: usize| times.iter().map(|t| t[n]).max().unwrap_or_default() as f64 / 1000.0;
        Ok(Times { micros: (0..iterations).map(slowest).collect(), wrong })
    }
}

impl Drop for Crew {
    fn drop(&mut self) {
        for (child, stdin) in &mut self.members {
            // The end of its input is the end of its work; it may be stuck in a call.
            drop(stdin.take());
            for _ in 0..50 {
                if !matches!(child.try_wait(), Ok(None)) {
                    break;
                }
                std::thread::sleep(Duration::from_millis(10));
            }
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
