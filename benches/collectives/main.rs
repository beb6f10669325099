//! Collectives, measured: `cargo xtask bench`, or `cargo bench --bench collectives -- [options]`.
//!
//! Every engine runs in processes (or threads) of its own, a *crew*; crews take turns, case by case and
//! round by round, so that a noisy machine is noisy for all of them. In each round the floor is measured
//! too: what the memory and the cores of this machine allow at this moment (`probes`).

mod cases;
mod crew;
mod member;
mod model;
mod mpi;
mod options;
mod plot;
mod probes;
mod report;
mod targets;
mod training;
mod wire;

use std::collections::HashMap;
use std::process::ExitCode;

use self::cases::{Case, Collective};
use self::crew::{Crew, Engine};
use self::options::Options;
use self::probes::Probes;
use self::report::{Row, Steps, median, percentile};
use self::training::{Mode, TENSOR_PARALLEL};

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments.first().is_some_and(|a| a == member::COMMAND) {
        return member::main(&arguments[1..]);
    }
    match Options::parse(&arguments).and_then(|options| run(&options)) {
        Ok(0) => ExitCode::SUCCESS,
        Ok(wrong) => {
            eprintln!("{wrong} results were wrong");
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Everything measured of one case on one engine.
#[derive(Default)]
struct Samples {
    /// The medians of the rounds, in microseconds.
    medians: Vec<f64>,
    all: Vec<f64>,
    /// The median over the floor of the same round.
    over_floor: Vec<f64>,
    /// How much of the loopback's raw rate in the same round; of the engine over TCP only.
    of_wire: Vec<f64>,
    wrong: u64,
}

fn run(options: &Options) -> Result<u64, String> {
    let mut rows = Vec::new();
    for world in options.worlds() {
        let mut crews = Vec::new();
        for &engine in &options.engines {
            match Crew::start(engine, world, options.pin) {
                Ok(crew) => crews.push(crew),
                Err(reason) => eprintln!("{engine} with {world} ranks is left out: {reason}"),
            }
        }
        let probes = Probes::new(world);
        for case in options.cases(world) {
            eprintln!("{case}, {world} ranks");
            rows.extend(measure(&case, world, &mut crews, &probes, options)?);
        }
        // The targets of training are for two ranks.
        for &model in options.models().iter().filter(|_| !options.targets || world == 2) {
            eprintln!("training {model}, {world} ranks");
            rows.extend(train(model, world, &mut crews, options)?);
        }
    }
    report::print(&rows);
    if options.targets {
        targets::print(&rows);
    }
    if let Some(path) = &options.json {
        report::write_json(path, &rows)?;
    }
    if let Some(path) = &options.svg {
        plot::write(path, &rows)?;
    }
    Ok(rows.iter().map(|row| row.wrong).sum())
}

fn measure(
    case: &Case,
    world: usize,
    crews: &mut Vec<Crew>,
    probes: &Probes,
    options: &Options,
) -> Result<Vec<Row>, String> {
    let mut samples: HashMap<Engine, Samples> = HashMap::new();
    let mut iterations: HashMap<Engine, usize> = HashMap::new();
    let mut failed = Vec::new();
    for crew in crews.iter_mut().filter(|c| c.engine.does(case)) {
        // How often, from a first try: as often as fits into the time of a round.
        match crew.run(case, 3) {
            Ok(times) => {
                let one = median(&times.micros).max(0.1);
                let often = (options.round_millis as f64 * 1000.0 / one) as usize;
                iterations.insert(crew.engine, often.clamp(3, 5000));
                samples.entry(crew.engine).or_default().wrong += times.wrong;
            }
            Err(reason) => failed.push((crew.engine, reason)),
        }
    }
    for round in 0..options.rounds {
        let floor = probes.floor(case);
        let one_way = case.collective == Collective::SendRecv;
        let wired = crews.iter().any(|c| of_wire(c.engine, case, world));
        let wire = wired.then(|| wire::micros(case.bytes, one_way)).flatten();
        // Whoever goes first finds colder caches: take turns at that too.
        let count = crews.len().max(1);
        for n in 0..crews.len() {
            let crew = &mut crews[(n + round) % count];
            let Some(&often) = iterations.get(&crew.engine) else { continue };
            match crew.run(case, often) {
                Ok(times) => {
                    let samples = samples.entry(crew.engine).or_default();
                    let middle = median(&times.micros);
                    samples.medians.push(middle);
                    samples.over_floor.push(middle / floor);
                    if of_wire(crew.engine, case, world) {
                        samples.of_wire.extend(wire.map(|wire| wire / middle));
                    }
                    samples.all.extend(times.micros);
                    samples.wrong += times.wrong;
                }
                Err(reason) => {
                    iterations.remove(&crew.engine);
                    failed.push((crew.engine, reason));
                }
            }
        }
    }
    for (engine, reason) in failed {
        eprintln!("{engine} failed at {case} and is left out from here on: {reason}");
        crews.retain(|crew| crew.engine != engine);
        samples.remove(&engine);
    }
    let of = |engine| samples.get(&engine).map(|s: &Samples| s.medians.clone()).filter(|m| !m.is_empty());
    let (gloo, model) = (of(Engine::Gloo), of(Engine::Model));
    let mut rows: Vec<Row> = options
        .engines
        .iter()
        .filter_map(|&engine| samples.get(&engine).map(|s| (engine, s)))
        .filter(|(_, s)| !s.medians.is_empty())
        .map(|(engine, s)| {
            let median_us = median(&s.medians);
            // Round by round: both were measured at about the same time.
            let over =
                |a: &[f64], b: &[f64]| median(&a.iter().zip(b).map(|(a, b)| a / b).collect::<Vec<_>>());
            let p99_us = percentile(&s.all, 0.99);
            let ratio_floor = median(&s.over_floor);
            Row {
                ratio_gloo: gloo.as_ref().map(|gloo| over(gloo, &s.medians)),
                ratio_model: model.as_ref().map(|model| over(&s.medians, model)),
                ratio_wire: (!s.of_wire.is_empty()).then(|| median(&s.of_wire)),
                ..Row::new(case, world, engine, median_us, p99_us, ratio_floor, s.wrong)
            }
        })
        .collect();
    rows.sort_by_key(|row| options.engines.iter().position(|e| e.names() == (row.engine, row.transport)));
    Ok(rows)
}

/// Whether the raw rate of one connection is what bounds this.
fn of_wire(engine: Engine, case: &Case, world: usize) -> bool {
    let sends_all = matches!(case.collective, Collective::AllReduce | Collective::SendRecv);
    engine == Engine::Tcp && world == 2 && sends_all && case.bytes > 0
}

/// Steps of training on every engine, beside steps of the same ranks alone (and, for tensor-parallel layers, the
/// time that their collectives take alone).
fn train(model: &str, world: usize, crews: &mut [Crew], options: &Options) -> Result<Vec<Row>, String> {
    const STEPS: usize = 8;
    let mut results: HashMap<Engine, (Steps, usize)> = HashMap::new();
    for _ in 0..options.rounds {
        for crew in crews.iter_mut().filter(|c| c.engine.trains()) {
            let (alone, _) = crew.train(model, Mode::Alone, STEPS)?;
            let (parallel, bytes) = crew.train(model, Mode::Parallel, STEPS)?;
            let mut least = median(&alone.micros);
            if model == TENSOR_PARALLEL {
                least += median(&crew.train(model, Mode::Exchange, STEPS)?.0.micros);
            }
            let (steps, size) = results.entry(crew.engine).or_default();
            let middle = median(&parallel.micros);
            steps.medians.push(middle);
            steps.over_alone.push(middle / least);
            steps.all.extend(parallel.micros);
            steps.wrong += parallel.wrong;
            *size = bytes;
        }
    }
    let gloo = results.get(&Engine::Gloo).map(|(steps, _)| steps.medians.clone());
    Ok(options
        .engines
        .iter()
        .filter_map(|&engine| {
            let (mut steps, bytes) = results.get(&engine)?.clone();
            steps.over_gloo = gloo.as_ref().map(|gloo| {
                let ratios: Vec<f64> = gloo.iter().zip(&steps.medians).map(|(g, m)| g / m).collect();
                median(&ratios)
            });
            Some(Row::training(model, world, engine, bytes, &steps))
        })
        .collect())
}
