//! The `torpor` program: arguments, progress, messages and exit codes around the libraries that do the work.
//!
//! One file per command. What a command is asked is in [`args`], what the program says by its exit code in
//! [`exit`]; nothing outside of this crate prints.

pub mod args;
mod attach;
mod check;
mod demo;
mod dump;
mod encoding;
mod every;
pub mod exit;
mod held;
mod lazy;
mod names;
mod output;
mod pidfile;
mod progress;
mod restore;
mod show;
mod squash;
mod stream;
mod verify;

use clap::{CommandFactory, Parser};

use args::{Cli, Command};
use exit::Exit;

/// Runs the program with the arguments of this process.
pub fn main() -> Exit {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(e) => {
            // Help is asked for and goes to stdout, everything else to stderr; if nobody reads it, be it so.
            let _unread = e.print();
            return if e.use_stderr() { Exit::Usage } else { Exit::Ok };
        }
    };
    take_signals();
    match run(cli.command) {
        Ok(exit) => exit,
        Err(e) if output::is_closed(&e) => Exit::Ok,
        Err(e) => {
            output::complain(&exit::message(&e));
            Exit::of(&e)
        }
    }
}

fn run(command: Command) -> anyhow::Result<Exit> {
    match command {
        Command::Dump(args) => dump::run(&args),
        Command::Restore(args) => restore::run(&args),
        Command::Check(args) => check::run(&args),
        Command::Show(args) => show::run(&args),
        Command::Verify(args) => verify::run(&args),
        Command::Squash(args) => squash::run(&args),
        Command::Demo(args) => demo::run(&args),
        Command::DemoProgram(args) => demo::program::run(&args),
        Command::Completions(args) => {
            let mut script = Vec::new();
            clap_complete::generate(args.shell, &mut Cli::command(), "torpor", &mut script);
            output::print(&String::from_utf8_lossy(&script))?;
            Ok(Exit::Ok)
        }
    }
}

/// A parent that ignores SIGCHLD hands that down, and then the kernel throws away the status of children. A file that
/// becomes too large (`ulimit -f`) is an error of the call, and not our end.
fn take_signals() {
    use nix::sys::signal::{SIGCHLD, SIGXFSZ, SigHandler, signal};
    // SAFETY: neither action is code of ours.
    let _never_fail = unsafe { (signal(SIGCHLD, SigHandler::SigDfl), signal(SIGXFSZ, SigHandler::SigIgn)) };
}

/// A restore opens first what a process had open, and a dump what is on its way in queues. The process gets its own
/// limit in the end.
fn raise_descriptor_limit() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    if let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE)
        && soft < hard
    {
        // As many as there are without it will do for most.
        let _ignored = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
}
