//! A stage whose process is killed ends the pipeline on all ranks; also one of a stage that several ranks share, and
//! one of several copies of the model.

use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use tch::{Device, Kind, Reduction, Tensor, nn};
use tch_distributed::data_parallel::DdpOptions;
use tch_distributed::model_parallel::DeviceMesh;
use tch_distributed::model_parallel::pipeline::{Pipeline, Schedule, Stage};
use tch_distributed::model_parallel::tensor::{ParallelLinearConfig, RowParallelLinear};
use tch_distributed::{self as dist, InitOptions};

/// Set to `dp,pp,tp` in the ranks.
const MARK: &str = "MODEL_PARALLEL_FAULT_TEST";

/// Trains until something happens, and says what.
fn be_a_rank(mesh: &str) -> ! {
    let sizes: Vec<usize> = mesh.split(',').map(|n| n.parse().unwrap()).collect();
    let world =
        dist::init_process_group("native", InitOptions::new().timeout(Duration::from_secs(60))).unwrap();
    let mesh = DeviceMesh::new(&world, &[("dp", sizes[0]), ("pp", sizes[1]), ("tp", sizes[2])]).unwrap();
    let [dp, pp, tp] = ["dp", "pp", "tp"].map(|axis| mesh.group(axis).unwrap());
    let vs = nn::VarStore::new(Device::Cpu);
    let config = ParallelLinearConfig { input_is_parallel: false, ..Default::default() };
    let stage = Stage::new(RowParallelLinear::new(vs.root(), 4, 4, config, &tp).unwrap());
    let pipeline = Pipeline::new(vec![stage], 4, Schedule::OneFOneB, &pp).unwrap();
    let pipeline = pipeline.data_parallel(&vs, &dp, DdpOptions::new()).unwrap();
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
    fn start(test: &str, mesh: &str, rank: usize, world: usize, port: u16) -> Self {
        let mut process = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", test, "--nocapture"])
            .envs([
                (MARK, mesh.to_owned()),
                ("RANK", rank.to_string()),
                ("WORLD_SIZE", world.to_string()),
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

/// Kills one rank of a mesh in training; gives what each of the others said at its end.
fn kill(test: &str, mesh: &str, world: usize, victim: usize) -> Vec<(usize, String)> {
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let mut ranks: Vec<_> = (0..world).map(|rank| Rank::start(test, mesh, rank, world, port)).collect();
    let deadline = Instant::now() + Duration::from_secs(90);
    for rank in &ranks {
        rank.line_with("training", deadline);
    }
    ranks[victim].process.kill().unwrap();
    let others = (0..world).filter(|&rank| rank != victim);
    others.map(|rank| (rank, ranks[rank].line_with("ended", deadline))).collect()
}

#[test]
fn killing_a_stage_ends_all_others_with_its_rank_and_stage() {
    if let Ok(mesh) = std::env::var(MARK) {
        be_a_rank(&mesh);
    }
    for victim in 0..3 {
        let test = "killing_a_stage_ends_all_others_with_its_rank_and_stage";
        for (rank, said) in kill(test, "1,3,1", 3, victim) {
            assert!(said.contains(&format!("rank {victim} was lost")), "rank {rank} said {said:?}");
            assert!(said.contains(&format!("it has stage {victim}")), "rank {rank} said {said:?}");
        }
    }
}

#[test]
fn killing_one_of_the_ranks_that_share_a_stage_ends_all_and_the_stage_is_named() {
    if let Ok(mesh) = std::env::var(MARK) {
        be_a_rank(&mesh);
    }
    // Rank 3 is the second half of stage 1 of the only copy: its peers in the stage and in the pipeline lose it
    // themselves, the fourth rank hears of it from them.
    let test = "killing_one_of_the_ranks_that_share_a_stage_ends_all_and_the_stage_is_named";
    for (rank, said) in kill(test, "1,2,2", 4, 3) {
        assert!(said.contains("was lost") && said.contains("stage"), "rank {rank} said {said:?}");
    }
}

#[test]
fn killing_a_stage_of_one_copy_of_the_model_ends_the_other_copies_too() {
    if let Ok(mesh) = std::env::var(MARK) {
        be_a_rank(&mesh);
    }
    let test = "killing_a_stage_of_one_copy_of_the_model_ends_the_other_copies_too";
    for (rank, said) in kill(test, "2,2,1", 4, 2) {
        assert!(said.contains("was lost") && said.contains("stage"), "rank {rank} said {said:?}");
    }
}
