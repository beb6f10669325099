//! `cargo xtask hosts`: two hosts on one machine. Network namespaces joined by a virtual cable each run
//! two ranks under `tchrun --nnodes 2`: the conformance suite between hosts, and a cable that is cut.

use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::cargo::{cargo, run as execute};
use crate::setup;

pub(crate) const ABOUT: &str =
    "Run the conformance suite between two network namespaces (2 x 2 ranks), then cut
the cable in the middle of it; needs root and iproute2";

const TEST: &str = "whole::the_product_as_a_table";
const PORT: &str = "29577";
/// Ranks that lost each other know it after this at the latest.
const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) fn run(_: &[String]) -> Result<()> {
    ensure!(rustix::process::geteuid().is_root(), "network namespaces need root");
    setup::ensure()?;
    execute(cargo().args(["build", "--quiet", "--bin", "tchrun"]))?;
    let program = test_program()?;
    let tchrun = setup::root().join("target/debug/tchrun");

    let hosts = Hosts::new()?;
    println!("the conformance suite, 2 hosts x 2 ranks");
    let nodes = [0, 1].map(|node| hosts.start(node, &tchrun, &program, None));
    for (node, child) in nodes.into_iter().enumerate() {
        let output = child?.wait_with_output()?;
        let text = String::from_utf8_lossy(&output.stdout);
        ensure!(
            output.status.success(),
            "node {node} failed:\n{text}\n{}",
            String::from_utf8_lossy(&output.stderr)
        );
        text.lines().filter(|line| line.starts_with("[rank 0] test result")).for_each(|l| println!("{l}"));
    }

    println!("its whole product, with the cable cut in the middle of it");
    let nodes = [0, 1].map(|node| hosts.start(node, &tchrun, &program, Some("3")));
    thread::sleep(Duration::from_secs(4));
    hosts.cut()?;
    for (node, child) in nodes.into_iter().enumerate() {
        let output = ended(child?).with_context(|| format!("node {node} hangs behind the cut cable"))?;
        let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
        ensure!(!output.status.success(), "node {node} ended well behind a cut cable:\n{text}");
        let said = text.lines().find(|line| line.contains("timed out") || line.contains("was lost"));
        println!(
            "node {node}: {}",
            said.context(format!("node {node} does not say what happened:\n{text}"))?
        );
    }
    Ok(())
}

/// Builds the conformance test and finds its program.
fn test_program() -> Result<PathBuf> {
    let output = cargo()
        .args(["test", "--test", "conformance", "--no-run", "--message-format", "json"])
        .stderr(Stdio::inherit())
        .output()
        .context("cargo does not start")?;
    ensure!(output.status.success(), "the conformance suite does not build");
    let text = String::from_utf8_lossy(&output.stdout);
    let path = text
        .lines()
        .filter(|line| line.contains("\"name\":\"conformance\""))
        .filter_map(|line| line.split("\"executable\":\"").nth(1)?.split('"').next())
        .next_back()
        .context("cargo does not say where the conformance suite is")?;
    Ok(PathBuf::from(path))
}

/// Waits for the end, but not for ever.
fn ended(mut child: Child) -> Result<Output> {
    let step = Duration::from_millis(100);
    let mut waited = Duration::ZERO;
    while child.try_wait()?.is_none() {
        if waited > PATIENCE {
            child.kill()?;
            bail!(
                "no end after {PATIENCE:?}:\n{}",
                String::from_utf8_lossy(&child.wait_with_output()?.stderr)
            );
        }
        thread::sleep(step);
        waited += step;
    }
    Ok(child.wait_with_output()?)
}

/// Two namespaces and the cable between them; gone when dropped.
struct Hosts {
    names: [String; 2],
}

impl Hosts {
    fn new() -> Result<Self> {
        let id = std::process::id();
        let hosts = Self { names: [format!("tchd-a-{id}"), format!("tchd-b-{id}")] };
        let [a, b] = &hosts.names;
        for name in [a, b] {
            ip(&["netns", "add", name])?;
        }
        ip(&["link", "add", "cable", "netns", a, "type", "veth", "peer", "name", "cable", "netns", b])?;
        for (name, address) in [(a, "10.231.7.1/24"), (b, "10.231.7.2/24")] {
            ip(&["-n", name, "address", "add", address, "dev", "cable"])?;
            ip(&["-n", name, "link", "set", "cable", "up"])?;
            ip(&["-n", name, "link", "set", "lo", "up"])?;
        }
        Ok(hosts)
    }

    /// Two ranks on one of the hosts.
    fn start(
        &self,
        node: usize,
        tchrun: &PathBuf,
        program: &PathBuf,
        timeout: Option<&str>,
    ) -> Result<Child> {
        let node_rank = node.to_string();
        Command::new("ip")
            .args(["netns", "exec", &self.names[node]])
            .arg(tchrun)
            .args(["--nnodes", "2", "--node-rank", &node_rank, "--nproc-per-node", "2"])
            .args(["--master-addr", "10.231.7.1", "--master-port", PORT])
            .arg(program)
            .args(["--exact", TEST, "--nocapture"])
            .env("TCHD_CONFORMANCE_RANKS", "launched")
            .envs(timeout.map(|seconds| ("TCHD_CONFORMANCE_TIMEOUT", seconds)))
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("`ip netns exec` does not start: is iproute2 installed?")
    }

    fn cut(&self) -> Result<()> {
        ip(&["-n", &self.names[1], "link", "set", "cable", "down"])
    }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        for name in &self.names {
            // A namespace that could not be made cannot be removed either.
            let _ = ip(&["netns", "delete", name]);
        }
    }
}

fn ip(arguments: &[&str]) -> Result<()> {
    let output =
        Command::new("ip").args(arguments).output().context("`ip` does not start: is iproute2 installed?")?;
    let words = arguments.join(" ");
    ensure!(
        output.status.success(),
        "`ip {words}` failed: {}",
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(())
}
