//! What the engine is meant to reach, read off the rows: `--targets`.

use tch::Kind;

use super::cases::{COLLECTIVES, Case, Collective};
use super::mpi::Flavour;
use super::report::Row;

const KIB: usize = 1 << 10;
const MIB: usize = 1 << 20;

/// The cases that the targets speak of, for a number of ranks.
pub(crate) fn cases(world: usize) -> Vec<Case> {
    let case = |collective, bytes, kind| Case { collective, bytes, kind };
    let sum = |bytes| case(Collective::AllReduce, bytes, Kind::Float);
    if world > 2 {
        return [4 * KIB, MIB, 16 * MIB, 64 * MIB].map(sum).to_vec();
    }
    let mut cases = [4, 4 * KIB, 64 * KIB, MIB, 16 * MIB, 64 * MIB, 256 * MIB].map(sum).to_vec();
    cases.push(case(Collective::AllReduce, 16 * MIB, Kind::BFloat16));
    let rooted = [Collective::AllReduce, Collective::Reduce, Collective::Gather, Collective::Scatter];
    for collective in COLLECTIVES.into_iter().filter(|c| !rooted.contains(c)) {
        let bytes = if collective == Collective::Barrier { 0 } else { 64 * MIB };
        cases.push(case(collective, bytes, Kind::Float));
    }
    cases
}

/// One comparison: what of, the number, what it should be at least or at most, and whether it is.
struct Verdict {
    what: String,
    measured: f64,
    wanted: String,
    met: bool,
}

/// Compares the rows with the targets and prints how it went.
pub(crate) fn print(rows: &[Row]) {
    let verdicts = verdicts(rows);
    println!("\n{:<58} {:>9} {:>9}", "target", "measured", "wanted");
    for Verdict { what, measured, wanted, met } in &verdicts {
        println!("{what:<58} {measured:>9.2} {wanted:>9} {}", if *met { "" } else { "missed" });
    }
    let met = verdicts.iter().filter(|v| v.met).count();
    println!("{met} of {} met", verdicts.len());
    let model = find(rows, "all_reduce", 4 * KIB, "f32", 2, "staged");
    if let Some(model) = model.filter(|m| m.median_us > 0.6) {
        let micros = model.median_us;
        println!(
            "The model takes {micros:.2} us for 4 KiB: a slow regime, in which ratios to Gloo and MPI do not bind."
        );
    }
}

fn find<'r>(
    rows: &'r [Row],
    collective: &str,
    bytes: usize,
    kind: &str,
    world: usize,
    transport: &str,
) -> Option<&'r Row> {
    rows.iter().find(|r| {
        (r.collective, r.bytes, r.kind, r.world, r.transport) == (collective, bytes, kind, world, transport)
    })
}

fn verdicts(rows: &[Row]) -> Vec<Verdict> {
    let mut verdicts = Vec::new();
    for row in rows.iter().filter(|r| r.engine == "native") {
        let name =
            format!("{} {} {} x{} {}", row.collective, size(row.bytes), row.kind, row.world, row.transport);
        let mut add = |what: &str, measured: Option<f64>, limit: f64, most: bool| {
            let Some(measured) = measured else { return };
            let met = if most { measured <= limit } else { measured >= limit };
            let wanted = format!("{} {limit}", if most { "<=" } else { ">=" });
            verdicts.push(Verdict { what: format!("{name}: {what}"), measured, wanted, met });
        };
        let other = |engine: &str, transport: &str| {
            rows.iter()
                .find(|r| {
                    (r.engine, r.transport) == (engine, transport)
                        && (r.collective, r.bytes, r.kind, r.world)
                            == (row.collective, row.bytes, row.kind, row.world)
                })
                .map(|r| r.median_us / row.median_us)
        };
        let (gloo, model) = (row.ratio_gloo, row.ratio_model);
        let mut over_mpi = None;
        const OVER_GLOO: &str = "times faster than Gloo";
        const OF_MODEL: &str = "times the staged model";
        match (row.transport, row.collective) {
            ("shm", "all_reduce") if row.kind == "bf16" => add(OVER_GLOO, gloo, 8.0, false),
            ("shm", "all_reduce") if row.world > 2 => {
                if row.bytes >= MIB {
                    add(OF_MODEL, model, 1.5, true);
                }
                add(OVER_GLOO, gloo, 8.0, false);
                over_mpi = Some(1.0);
            }
            ("shm", "all_reduce") if row.bytes <= 64 * KIB => {
                add(OF_MODEL, model, 3.0, true);
                add(OVER_GLOO, gloo, 50.0, false);
                over_mpi = Some(1.0);
            }
            ("shm", "all_reduce") => {
                add(OF_MODEL, model, 1.5, true);
                add(OVER_GLOO, gloo, if row.bytes < 16 * MIB { 20.0 } else { 8.0 }, false);
                over_mpi = Some(1.5);
            }
            ("shm-allocated", "all_reduce") if row.kind == "f32" && row.bytes >= 64 * KIB => {
                add("times faster than private tensors", other("native", "shm"), 1.0, false);
                if row.bytes >= 64 * MIB && row.world == 2 {
                    add("times the floor", Some(row.ratio_floor), 2.0, true);
                }
            }
            ("tcp", "all_reduce") => {
                add(OVER_GLOO, gloo, 1.0, false);
                if row.bytes >= 16 * MIB {
                    add("of the loopback's raw rate", row.ratio_wire, 0.85, false);
                }
            }
            ("tcp", "send_recv") => add(OVER_GLOO, gloo, 1.0, false),
            ("shm", "ddp_mlp_25m") => add("times stepping alone", Some(row.ratio_floor), 1.10, true),
            ("shm", "ddp_gpt_10m") => add("times stepping alone", Some(row.ratio_floor), 1.03, true),
            ("shm", "tp_mlp") => add("times its parts", Some(row.ratio_floor), 1.0, true),
            ("shm", collective) => {
                add(OVER_GLOO, gloo, if collective == "all_to_all" { 2.0 } else { 4.0 }, false);
                over_mpi = Some(1.0);
            }
            _ => {}
        }
        if let Some(limit) = over_mpi {
            for name in [Flavour::OpenMpi, Flavour::Mpich].map(Flavour::name) {
                add(&format!("times faster than {name}"), other(name, "shm"), limit, false);
            }
        }
    }
    verdicts
}

fn size(bytes: usize) -> String {
    match bytes {
        0..KIB => format!("{bytes}"),
        KIB..MIB => format!("{}K", bytes / KIB),
        _ => format!("{}M", bytes / MIB),
    }
}
