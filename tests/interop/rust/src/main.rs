//! A bustcall daemon that speaks the base protocol and nothing else, as the existing Rust daemon does.
//!
//! Here is the command line alone: what the daemon answers is in `daemon`, and how this crate is held to the test
//! vectors that every language shares in `vectors`. For these alone it has what a client needs, too: what a version is,
//! in `semverx`, what a fault weighs, in `faults`, and what an answer says, in `replies`.

mod daemon;
mod faults;
mod replies;
mod semverx;
mod vectors;

use std::env;
use std::fmt::Display;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::str::FromStr;

const USAGE: &str = "\
usage: bustcall-rust-daemon [--port N] [--history N] [--stage N] [--html]
       bustcall-rust-daemon --check-vectors DIR

  --port N             listen on 127.0.0.1:N; 0 takes any free port (default 8989)
  --history N          begin with a history of N faults
  --stage N            report the fault stage N, 0 to 255, for every bust, instead of the tolerance asked for
  --html               answer every bust with a 502 and an HTML page, as a broken proxy would
  --check-vectors DIR  check this crate against the JSON test vectors in DIR, and end";

enum Command {
    Serve(u16, daemon::Behaviour),
    CheckVectors(PathBuf),
    Help,
}

#[tokio::main]
async fn main() -> ExitCode {
    match parse(env::args().skip(1)) {
        Err(why) => {
            eprintln!("{why}\n{USAGE}");
            ExitCode::from(2)
        }
        Ok(Command::Help) => {
            println!("{USAGE}");
            ExitCode::SUCCESS
        }
        Ok(Command::CheckVectors(directory)) => check_vectors(&directory).await,
        Ok(Command::Serve(port, behaviour)) => serve(port, behaviour).await,
    }
}

fn parse(mut arguments: impl Iterator<Item = String>) -> Result<Command, String> {
    let mut port = 8989;
    let mut behaviour = daemon::Behaviour::default();
    while let Some(option) = arguments.next() {
        match option.as_str() {
            "--port" => port = value(&option, arguments.next())?,
            "--history" => behaviour.history = value(&option, arguments.next())?,
            "--stage" => behaviour.stage = Some(value(&option, arguments.next())?),
            "--html" => behaviour.html = true,
            "--check-vectors" => {
                return Ok(Command::CheckVectors(value(&option, arguments.next())?))
            }
            "--help" => return Ok(Command::Help),
            _ => return Err(format!("unknown option {option}")),
        }
    }
    Ok(Command::Serve(port, behaviour))
}

fn value<T>(option: &str, text: Option<String>) -> Result<T, String>
where
    T: FromStr,
    T::Err: Display,
{
    let text = text.ok_or_else(|| format!("{option} needs a value"))?;
    text.parse()
        .map_err(|why| format!("{option} {text}: {why}"))
}

async fn serve(port: u16, behaviour: daemon::Behaviour) -> ExitCode {
    match daemon::bind(port, behaviour) {
        Err(why) => {
            eprintln!("cannot listen on port {port}: {why}");
            ExitCode::FAILURE
        }
        Ok((address, server)) => {
            println!("listening on http://{address}");
            // Whoever started this daemon may not read the line; that is no reason to end.
            let _ = io::stdout().flush();
            server.await;
            ExitCode::SUCCESS
        }
    }
}

async fn check_vectors(directory: &Path) -> ExitCode {
    let report = vectors::check(directory).await;
    for (file, count) in &report.checked {
        println!("{file}: {count} checked");
    }
    for mismatch in &report.mismatches {
        eprintln!("{mismatch}");
    }
    if report.mismatches.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
