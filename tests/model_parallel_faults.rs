//! A stage whose process is killed ends the pipeline on all ranks.

use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use tch::{Device, Kind, Reduction, Tensor, nn};
use tch_distributed::model_parallel::pipeline::{Pipeline, Schedule, Stage};
use tch_distributed::{self as dist, InitOptions};

const STAGES: usize = 3;
const MARK: &str = "MODEL_PARALLEL_FAULT_TEST";

/// Trains until something happens, and says what.
fn be_a_stage() -> ! {
    let group =
        dist::init_process_group("native", InitOptions::new().timeout(Duration::from_secs(60))).unwrap();
    let vs = nn::VarStore::new(Device::Cpu);
    let stage = Stage::new(nn::linear(vs.root(), 4, 4, Default::default()));
    let pipeline = Pipeline::new(vec![stage], 4, Schedule::OneFOneB, &group).unwrap();
    let xs = Tensor::ones([8, 4], (Kind::Float, Device::Cpu));
    let step =
        || pipeline.step(Some(&xs), Some(&xs), |ys: &Tensor, ts: &Tensor| ys.mse_loss(ts, Reduction::Mean));
    step().unwrap();
    println!("training");
    loop {
        if let Err(error) = step() {
            println!("ended: {error}");
            std::process::exit(0);
        }
    }
}

struct Rank {
    process: Child,
    lines: Receiver<String>,
}

impl Drop for Rank {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Rank {
    fn start(test: &str, rank: usize, port: u16) -> Self {
        let mut process = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", test, "--nocapture"])
            .envs([
                (MARK, "1".to_owned()),
                ("RANK", rank.to_string()),
                ("WORLD_SIZE", STAGES.to_string()),
                ("MASTER_ADDR", "127.0.0.1".to_owned()),
                ("MASTER_PORT", port.to_string()),
                ("OMP_NUM_THREADS", "1".to_owned()),
            ])
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let (said, lines) = channel();
        let output = BufReader::new(process.stdout.take().unwrap());
        std::thread::spawn(move || output.lines().map_while(Result::ok).try_for_each(|line| said.send(line)));
        Self { process, lines }
    }

    fn line_with(&self, word: &str, deadline: Instant) -> String {
        loop {
            let line = self.lines.recv_timeout(deadline.saturating_duration_since(Instant::now()));
            match line {
                Ok(line) if line.contains(word) => return line,
                Ok(_) => {}
                Err(_) => panic!("a rank had not said {word:?} at the deadline, or ended before"),
            }
        }
    }
}

#[test]
fn killing_a_stage_ends_all_others_with_its_rank_and_stage() {
    if std::env::var_os(MARK).is_some() {
        be_a_stage();
    }
    let test = "killing_a_stage_ends_all_others_with_its_rank_and_stage";
    for victim in 0..STAGES {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let mut world: Vec<_> = (0..STAGES).map(|rank| Rank::start(test, rank, port)).collect();
        let deadline = Instant::now() + Duration::from_secs(90);
        for rank in &world {
            rank.line_with("training", deadline);
        }
        world[victim].process.kill().unwrap();
        for rank in (0..STAGES).filter(|&rank| rank != victim) {
            let said = world[rank].line_with("ended", deadline);
            assert!(said.contains(&format!("rank {victim} was lost")), "rank {rank} said {said:?}");
            assert!(said.contains(&format!("it has stage {victim}")), "rank {rank} said {said:?}");
        }
    }
}
