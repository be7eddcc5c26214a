//! What can be asked on the command line, and the help that explains it.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

/// Freeze a running program into a directory, and wake it up again from there
///
/// Torpor writes everything that a running program is (its memory, threads, open files, timers and more) into
/// a directory, the image. From the image it comes back later and goes on at the very instruction where it
/// was. The program need not be prepared for that.
#[derive(Debug, Parser)]
#[command(name = "torpor", version, arg_required_else_help = true, after_long_help = CLI_EXAMPLES)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

const CLI_EXAMPLES: &str = "\
Examples:
  torpor demo                   see it all at work, in five seconds
  torpor check                  what this machine allows
  torpor check 4711             what a dump of process 4711 would find
  torpor dump 4711 image        write process 4711 to the directory `image`, and end it
  torpor show image             look inside
  torpor restore image          wake it up again

Exit codes: 0 done, 1 unexpected, 2 usage, 3 no such process, 4 privilege missing, 5 cannot be dumped,
6 image damaged, 7 machine does not fit, 8 pid, port or file taken, gone or changed, 9 cannot write there,
10 a limit was hit, 11 the key of an encrypted image is missing or wrong,
12 memory of a lazy restore was lost. An attached `restore` exits as its program does. docs/exit-codes.md tells more.";

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Write a running process to a directory
    Dump(DumpArgs),
    /// Wake up a process from its image
    Restore(RestoreArgs),
    /// Tell what this machine allows, or what a dump of a process would find
    Check(CheckArgs),
    /// Show what is in an image
    Show(ShowArgs),
    /// Check every checksum and reference of an image
    Verify(VerifyArgs),
    /// Make an image that needs no other one of an image that builds on others
    Squash(SquashArgs),
    /// See a small program frozen and woken up, step by step
    Demo(DemoArgs),
    /// Print a completion script for a shell
    Completions(CompletionArgs),
    /// The program that the demo freezes
    #[command(hide = true)]
    DemoProgram(DemoProgramArgs),
}

/// Write a running process to a directory
///
/// The process is stopped for a moment, written to DIR, and then ended. If anything goes wrong it runs on as
/// if nothing had happened, and nothing is left in DIR. What would be lost is refused by name before the
/// process is stopped: `torpor check PID` tells beforehand.
#[derive(Debug, Args)]
#[command(after_long_help = DUMP_EXAMPLES)]
pub struct DumpArgs {
    /// Let the process run on when the image is complete
    ///
    /// What it does from then on is not undone by a restore: files it writes, answers it gives.
    #[arg(long, conflicts_with = "leave_stopped")]
    pub leave_running: bool,
    /// Leave the process stopped, as `kill -STOP` does; `kill -CONT` lets it go on
    #[arg(long)]
    pub leave_stopped: bool,
    /// In which way the memory is taken
    ///
    /// `copy`: while the process stands still. `fork`: from copy-on-write children that are made while it stands still,
    /// and read when it runs again; for that they take a page for every one that it writes meanwhile. Without this option
    /// `fork` is chosen with --leave-running where there is much memory and room for it. What cannot be done by
    /// `fork` is copied, and it is said why.
    #[arg(long, value_enum, value_name = "HOW")]
    pub freeze: Option<Freeze>,
    /// What becomes of TCP connections to programs outside of the dump
    ///
    /// Connections with both ends in the dump are always kept. Others go on for a while without noticing
    /// (`keep`: restore it within minutes, and once only), or are found reset by the restored program (`close`).
    #[arg(long, value_enum, value_name = "WHAT", default_value_t = Tcp::Refuse)]
    pub tcp: Tcp,
    /// Return only when the image is on stable storage
    ///
    /// Without it a power failure in the next seconds may take the image along.
    #[arg(long)]
    pub fsync: bool,
    /// Rules for files: which of them the image brings along
    ///
    /// Lines `keep GLOB` (the file must be there at the restore, as large as it was), `save GLOB` (its contents go
    /// into the image; it is made again when it is missing, and put back when it differs) and `truncate GLOB` (what it
    /// grew since the dump is cut off). The last one that fits a path decides; `#` begins a comment. Globs fit whole
    /// absolute paths: `*` and `?` no slash, `**` anything, `[a-z]` one character. Without a rule, files on tmpfs that
    /// the program writes to are saved, and of small or shared ones that it made itself a spare copy is taken.
    #[arg(long, value_name = "RULES")]
    pub files: Option<PathBuf>,
    /// Like a rule `save GLOB`, after those of --files; may be repeated
    #[arg(long, value_name = "GLOB")]
    pub save_files: Vec<String>,
    /// Like a rule `truncate GLOB`, after those of --files; may be repeated
    #[arg(long, value_name = "GLOB")]
    pub truncate_files: Vec<String>,
    /// What to do about unix sockets whose other end is not part of the dump, which is refused else
    ///
    /// `reconnect`: the restore connects them anew to the address of their peer, and fails if nobody listens
    /// there. `closed`: after the restore the peer is gone. PATTERN is compared with the address of the
    /// peer; `*` stands for anything, and an abstract address begins with `@`. May be given again; the first
    /// that fits holds.
    #[arg(long, value_name = "POLICY[:PATTERN]")]
    pub external_unix: Vec<torpor_dumper::ExternalUnix>,
    /// Go on following what the process writes, for the next dump
    ///
    /// A small process of torpor's stays behind until the process ends or is dumped with --parent. The first write to
    /// each page after a dump costs the process a microsecond or two. Implies --leave-running.
    #[arg(long, conflicts_with = "leave_stopped")]
    pub track: bool,
    /// Write only what has changed since the dump in DIR, which must stay where it is
    ///
    /// That dump must have been made with --track; else everything counts as changed. Most is copied while the process
    /// still runs.
    #[arg(long, value_name = "DIR")]
    pub parent: Option<PathBuf>,
    /// Dump it again and again, every so often (`30s`, `5m`, `1h`), to numbered directories in DIR, until it ends
    ///
    /// Each is a whole image, though only what has changed is written: files that did not change have a name in each.
    #[arg(long, value_name = "TIME", value_parser = crate::every::duration, conflicts_with_all = ["leave_stopped", "parent"])]
    pub every: Option<std::time::Duration>,
    /// How many of them are kept; older ones are removed
    #[arg(long, value_name = "N", requires = "every", value_parser = clap::value_parser!(u32).range(1..))]
    pub keep: Option<u32>,
    /// How the image is written.
    #[command(flatten)]
    pub encoding: EncodingArgs,
    /// Print nothing but errors
    #[arg(short, long)]
    pub quiet: bool,
    /// Print the summary as JSON
    #[arg(long)]
    pub json: bool,
    /// The process
    #[arg(value_parser = clap::value_parser!(i32).range(1..))]
    pub pid: i32,
    /// The directory of the image: made if it is missing, refused if it holds an image; `-` for standard output
    ///
    /// On standard output the image is a tar archive of the files that would be in the directory. What else there is to
    /// say goes to standard error. The process is ended when all of it was written.
    pub dir: PathBuf,
}

/// How the image is written.
#[derive(Debug, Args)]
pub struct EncodingArgs {
    /// Compress contents: fast (lz4), or smaller (zstd)
    ///
    /// A process that runs on does not wait for it. The restore needs no option.
    #[arg(long, value_enum, value_name = "HOW")]
    pub compress: Option<Compress>,
    /// Encrypt the image for RECIPIENT: `age1...`, as age-keygen prints it, or an ssh public key; may be repeated
    ///
    /// Any one of the recipients can restore it, with `--identity FILE`.
    #[arg(long, value_name = "RECIPIENT")]
    pub encrypt: Vec<String>,
    /// Encrypt the image for the recipients in FILE, one on each line; may be repeated
    #[arg(long, value_name = "FILE")]
    pub encrypt_to: Vec<PathBuf>,
    /// The key of the image that --parent names, if that is encrypted; may be repeated
    #[arg(long, value_name = "FILE")]
    pub identity: Vec<PathBuf>,
}

/// How contents are compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Compress {
    /// Fast, of moderate gain
    Lz4,
    /// Smaller, at several times the work
    Zstd,
}

/// How an image is read.
#[derive(Debug, Args)]
pub struct ReadingArgs {
    /// The key of an encrypted image: a file of age identities, or an ssh private key; may be repeated
    #[arg(long, value_name = "FILE")]
    pub identity: Vec<PathBuf>,
    /// Where an image from standard input is kept meanwhile (default: $TMPDIR or /tmp)
    #[arg(long, value_name = "DIR")]
    pub spool: Option<PathBuf>,
}

/// What becomes of TCP connections to the outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Tcp {
    /// The dump is refused
    Refuse,
    /// The restored program finds them reset
    Close,
    /// They go on; the process must end with the dump
    Keep,
}

/// In which way memory is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Freeze {
    /// While the process stands still
    Copy,
    /// From copy-on-write children, when it runs again
    Fork,
    /// What has changed since a dump before, while it stands still
    Track,
}

const DUMP_EXAMPLES: &str = "\
Examples:
  torpor dump 4711 image                    write it and end it
  torpor dump --leave-running 4711 backup   a backup of a running service
  torpor dump --track 4711 first; torpor dump --track --parent first 4711 second
                                            the second has only what changed
  torpor dump --every 30s --keep 3 4711 backups
                                            the last three are always there
  torpor dump --truncate-files '/var/log/**' 4711 image
                                            logs are cut back to where they were
  torpor dump --compress zstd --encrypt age1... 4711 image
                                            small, and for one reader only
  torpor dump --compress lz4 4711 - | ssh there torpor restore --detach -
                                            move it to another machine
  torpor dump --json 4711 image | jq .bytes";

/// Wake up a process from its image
///
/// The process gets the pid it had, and goes on where it was. Until it stands complete nothing of it runs, so
/// that a restore that fails leaves nothing behind. The image is not changed and can be restored again.
///
/// Without --detach Torpor stays as the parent: it passes signals on (SIGINT, SIGTERM, SIGHUP, SIGQUIT,
/// SIGUSR1, SIGUSR2, SIGCONT, SIGTSTP, SIGWINCH), lends the terminal, and exits with the program's status,
/// 128+N if signal N ended it.
#[derive(Debug, Args)]
#[command(after_long_help = RESTORE_EXAMPLES)]
pub struct RestoreArgs {
    /// Return once the process runs, and print its pid
    #[arg(short, long)]
    pub detach: bool,
    /// Write the pid of the process to FILE, before it runs
    #[arg(long, value_name = "FILE")]
    pub pidfile: Option<PathBuf>,
    /// Leave the process stopped; `kill -CONT` lets it go on
    #[arg(long)]
    pub stopped: bool,
    /// Let the process run at once; its memory comes when it is needed
    ///
    /// The first instruction runs within milliseconds, whatever the size. Pages are served as they are touched, and all
    /// others meanwhile. Torpor stays until all are there: with --detach a process of its own does. DIR must stay
    /// and stay as it is until then. What cannot be read any more is tried for ten seconds, then the process is ended
    /// (exit code 11): it never sees wrong bytes. It cannot be dumped until all memory is there.
    #[arg(long)]
    pub lazy: bool,
    /// Write to FILE which memory was needed first; the rest comes when the process needs nothing for a second
    #[arg(long, value_name = "FILE", requires = "lazy")]
    pub record: Option<PathBuf>,
    /// Fill the memory listed in FILE first, in its order: one that --record has written
    #[arg(long, value_name = "FILE", requires = "lazy")]
    pub working_set: Option<PathBuf>,
    /// Print the steps of the restore and do none of them
    #[arg(long, conflicts_with_all = ["detach", "pidfile", "stopped"])]
    pub plan: bool,
    /// Take files that changed since the dump as they are now
    ///
    /// A program that reads or maps a file which is not what it was may go wrong: hence they are refused
    /// without it.
    #[arg(long)]
    pub accept_changed: bool,
    /// Compare all contents with their checksums first, as `torpor verify` does
    #[arg(long)]
    pub verify: bool,
    /// How the image is read.
    #[command(flatten)]
    pub reading: ReadingArgs,
    /// Print the pid, or the plan, as JSON
    #[arg(long)]
    pub json: bool,
    /// The directory of the image; `-` for a tar archive of it on standard input
    pub dir: PathBuf,
}

const RESTORE_EXAMPLES: &str = "\
Examples:
  torpor restore image                            in the foreground, until it ends
  torpor restore --detach --pidfile run/pid image as a service
  torpor restore --lazy image                     runs at once, whatever its size
  torpor restore --plan image                     see what would be done, without privilege";

/// Tell what this machine allows, or what a dump of a process would find
///
/// Without PID every kernel interface that Torpor uses is tried once: what is missing, what that costs, and
/// which privileges would bring more. With PID that process is looked at, but not stopped: what a dump would
/// take, lose or refuse, and what to do about it.
#[derive(Debug, Args)]
#[command(after_long_help = CHECK_EXAMPLES)]
pub struct CheckArgs {
    /// Print it as JSON
    #[arg(long)]
    pub json: bool,
    /// The process
    #[arg(value_parser = clap::value_parser!(i32).range(1..))]
    pub pid: Option<i32>,
}

const CHECK_EXAMPLES: &str = "\
Examples:
  torpor check                    exits with 0 if processes can be dumped and restored here
  torpor check 4711               exits with 0 if that process can be dumped, with 5 if not
  torpor check --json | jq '.interfaces[] | select(.present | not)'";

/// Show what is in an image
///
/// Where and when it was taken, the threads and where each of them stands, the memory map, descriptors,
/// locks, timers, signal handlers, and in which files the bytes are.
#[derive(Debug, Args)]
#[command(after_long_help = SHOW_EXAMPLES)]
pub struct ShowArgs {
    /// How the image is read.
    #[command(flatten)]
    pub reading: ReadingArgs,
    /// Print everything there is, as JSON
    #[arg(long)]
    pub json: bool,
    /// The directory of the image; `-` for a tar archive of it on standard input
    pub dir: PathBuf,
}

const SHOW_EXAMPLES: &str = "\
Examples:
  torpor show image
  torpor show --json image | jq '.tasks[].threads[].name'";

/// Make an image that needs no other one of an image that builds on others
///
/// What a dump with --parent has left in earlier images becomes the image's own: files get a second name where they may,
/// and are copied where not. Images that build on this one go on doing so.
#[derive(Debug, Args)]
pub struct SquashArgs {
    /// Return only when the image is on stable storage
    #[arg(long)]
    pub fsync: bool,
    /// How the metadata of an encrypted image is written, and its key.
    #[command(flatten)]
    pub encoding: EncodingArgs,
    /// Print the summary as JSON
    #[arg(long)]
    pub json: bool,
    /// The directory of the image
    pub dir: PathBuf,
    /// Where the new one goes; without it, it takes the place of the old one
    pub to: Option<PathBuf>,
}

/// Check every checksum and reference of an image
///
/// Reads all of the image. An image that passes is what the dump has written.
#[derive(Debug, Args)]
pub struct VerifyArgs {
    /// How the image is read.
    #[command(flatten)]
    pub reading: ReadingArgs,
    /// Print the result as JSON
    #[arg(long)]
    pub json: bool,
    /// The directory of the image; `-` for a tar archive of it on standard input
    pub dir: PathBuf,
}

/// See a small program frozen and woken up, step by step
///
/// Starts a program that counts, writes it to a directory and ends it, looks at what was written, and wakes
/// it up again. Needs the privilege to restore (`torpor check`), takes some seconds and leaves nothing
/// behind.
#[derive(Debug, Args)]
pub struct DemoArgs {
    /// Print only the outcome, as JSON
    #[arg(long)]
    pub json: bool,
}

/// Print a completion script for a shell
#[derive(Debug, Args)]
#[command(after_long_help = "Example:\n  torpor completions bash > /etc/bash_completion.d/torpor")]
pub struct CompletionArgs {
    /// The shell
    pub shell: clap_complete::Shell,
}

/// The program that the demo freezes
#[derive(Debug, Args)]
pub struct DemoProgramArgs {
    /// Where it writes its numbers.
    pub dir: PathBuf,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_definition_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_pid_is_a_positive_number() {
        for wrong in ["0", "-1", "x", "4294967297", ""] {
            assert!(Cli::try_parse_from(["torpor", "dump", wrong, "dir"]).is_err(), "{wrong}");
        }
        assert!(Cli::try_parse_from(["torpor", "dump", "1", "dir"]).is_ok());
    }

    #[test]
    fn what_excludes_each_other() {
        for wrong in [
            &["dump", "--leave-running", "--leave-stopped", "1", "d"][..],
            &["restore", "--plan", "--detach", "d"],
            &["restore", "--plan", "--pidfile", "p", "d"],
            &["restore", "--record", "f", "d"],
            &["dump", "--external-unix", "reset", "1", "d"],
        ] {
            assert!(Cli::try_parse_from([&["torpor"], wrong].concat()).is_err(), "{wrong:?}");
        }
    }
}
