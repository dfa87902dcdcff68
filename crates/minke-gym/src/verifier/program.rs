//! Answers that an external program checks.
//!
//! The answer goes to the program's standard input; it ends with 0 for right and 1 for wrong. Anything else (another
//! status, a signal, no end within the time) is [`Verdict::Error`]. Prompt and expected answer are in the environment
//! (`MINKE_PROMPT`, `MINKE_EXPECTED`) and replace `{prompt}` and `{expected}` in the arguments; beyond that the
//! environment is bare, so what the user has in theirs does not leak to it.
//!
//! A program runs in a process group of its own, which is killed as a whole when the program has ended: what it forked
//! does not outlive it. (A process that leaves the group on purpose does, within its limits: this is a fence against
//! accidents, no sandbox.) The limits on processor time, memory per process and file size are set by a shell's `ulimit`
//! before it becomes the program by `exec`; so they hold from the first instruction, for all that is forked, and need
//! no unsafe code between fork and exec. What is written to standard output goes nowhere; of standard error the
//! beginning is kept for the message and the rest is read and dropped.

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, ChildStdin, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, WaitIdStatus, kill_process_group, waitid};
use serde_json::Value;

use super::options::{OptionError, Options};
use crate::Verdict;

/// Bytes of standard error that a message shows.
const SHOWN_BYTES: usize = 400;
/// A program that has more to say on standard error than this is stopped.
const MOST_STDERR_BYTES: usize = 16 << 20;
/// No file that a program writes is larger, in blocks of 512 bytes (64 MiB; some shells count in KiB: 128).
const MOST_FILE_BLOCKS: u32 = 1 << 17;
/// How often an end is looked for when there is nothing to read or write.
const TICK: Duration = Duration::from_millis(2);

/// What a program may use for one answer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Limits {
    /// Wall-clock time.
    pub timeout: Duration,
    /// Processor time of each process, in seconds.
    pub cpu_s: u32,
    /// Address space of each process, in MiB.
    pub memory_mib: u32,
}

/// See the module.
#[derive(Debug)]
pub struct Program {
    path: PathBuf,
    arguments: Vec<String>,
    folder: PathBuf,
    limits: Limits,
}

impl Program {
    pub fn read(options: &mut Options, folder: &Path) -> Result<Self, OptionError> {
        let wrong = |got: &Value| {
            OptionError::expected("command", "a program, or a list of a program and its arguments", got)
        };
        let command = match options.take("command") {
            None => return Err(OptionError::new("`program` needs a `command`")),
            Some(Value::String(program)) => vec![program],
            Some(Value::Array(list)) => {
                let read: Result<Vec<String>, _> = list
                    .iter()
                    .map(|one| one.as_str().map(str::to_owned).ok_or_else(|| wrong(one)))
                    .collect();
                read?
            }
            Some(other) => return Err(wrong(&other)),
        };
        let [program, arguments @ ..] = command.as_slice() else {
            return Err(wrong(&Value::Array(Vec::new())));
        };
        let timeout_s = options.number("timeout_s", 0.01, 3600.0)?.unwrap_or(10.0);
        let cpu_s = options.number("cpu_s", 1.0, 3600.0)?.unwrap_or_else(|| timeout_s.ceil());
        let memory_mib = options.number("memory_mib", 1.0, 1048576.0)?.unwrap_or(512.0);
        let limits = Limits {
            timeout: Duration::from_secs_f64(timeout_s),
            cpu_s: cpu_s.ceil() as u32,
            memory_mib: memory_mib.ceil() as u32,
        };
        let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
        let folder = folder.canonicalize().map_err(|error| {
            OptionError::new(format!("`command`: cannot open the folder {}: {error}", folder.display()))
        })?;
        Ok(Self { path: find(program, &folder)?, arguments: arguments.to_vec(), folder, limits })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn run(&self, prompt: &str, expected: &str, answer: &str) -> Verdict {
        self.outcome(prompt, expected, answer).unwrap_or_else(Verdict::Error)
    }

    fn outcome(&self, prompt: &str, expected: &str, answer: &str) -> Result<Verdict, String> {
        let name = self.path.display();
        let mut running =
            self.start(prompt, expected).map_err(|error| format!("cannot run {name}: {error}"))?;
        let ended = running.attend(answer.as_bytes(), self.limits.timeout);
        let status = running.end();
        let said = running.said();
        let status = match ended.map_err(|error| format!("{name}: {error}"))? {
            End::Exited => status,
            End::Timeout => {
                return Err(format!(
                    "{name} did not end within {} s{said}",
                    self.limits.timeout.as_secs_f64()
                ));
            }
            End::TooMuch => {
                return Err(format!("{name} wrote more than {MOST_STDERR_BYTES} bytes of errors{said}"));
            }
        };
        let status = status.map_err(|error| format!("cannot wait for {name}: {error}"))?;
        match (status.code(), std::os::unix::process::ExitStatusExt::signal(&status)) {
            (Some(0), _) => Ok(Verdict::Right),
            (Some(1), _) => Ok(Verdict::Wrong),
            (Some(code), _) => {
                Err(format!("{name} ended with status {code}; expected 0 for right or 1 for wrong{said}"))
            }
            (None, Some(signal)) if signal == Signal::XCPU.as_raw() => {
                Err(format!("{name} used more than {} s of processor time{said}", self.limits.cpu_s))
            }
            (None, signal) => Err(format!("{name} was ended by signal {}{said}", signal.unwrap_or(0))),
        }
    }

    fn start(&self, prompt: &str, expected: &str) -> std::io::Result<Running> {
        let Limits { cpu_s, memory_mib, .. } = self.limits;
        // soft limit below the hard one: the signal then tells what happened. A system that does not know a limit
        // runs the program without it, and the wall clock still holds
        let script = format!(
            "ulimit -c 0; ulimit -f {MOST_FILE_BLOCKS}; ulimit -S -t {cpu_s}; ulimit -H -t {}; ulimit -v {}; \
             exec \"$0\" \"$@\"",
            cpu_s + 2,
            u64::from(memory_mib) * 1024,
        );
        let fill = |argument: &String| argument.replace("{prompt}", prompt).replace("{expected}", expected);
        let kept = ["PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "TZ"];
        let mut child = Command::new("/bin/sh")
            .arg("-c")
            .arg(script)
            .arg(&self.path)
            .args(self.arguments.iter().map(fill))
            .env_clear()
            .envs(kept.into_iter().filter_map(|name| Some((name, std::env::var_os(name)?))))
            .env("MINKE_PROMPT", prompt)
            .env("MINKE_EXPECTED", expected)
            .current_dir(&self.folder)
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()?;
        let (stdin, stderr) = (child.stdin.take(), child.stderr.take());
        Ok(Running { child, stdin, stderr, shown: Vec::new(), read: 0 })
    }
}

/// How a program came to its end.
enum End {
    Exited,
    Timeout,
    TooMuch,
}

/// A program at work. Ending it kills its group; so does dropping it.
struct Running {
    child: Child,
    stdin: Option<ChildStdin>,
    stderr: Option<ChildStderr>,
    /// The beginning of its standard error.
    shown: Vec<u8>,
    /// Bytes of standard error read.
    read: usize,
}

impl Running {
    /// Feeds the program and reads it until it ends, never blocking on what it (or a child of it) does not do.
    fn attend(&mut self, mut input: &[u8], timeout: Duration) -> std::io::Result<End> {
        let deadline = Instant::now() + timeout;
        if let Some(stdin) = &self.stdin {
            fcntl_setfl(stdin, fcntl_getfl(stdin)? | OFlags::NONBLOCK)?;
        }
        if let Some(stderr) = &self.stderr {
            fcntl_setfl(stderr, fcntl_getfl(stderr)? | OFlags::NONBLOCK)?;
        }
        loop {
            if input.is_empty() {
                self.stdin = None;
            }
            // before reading, so that all is read that was written before the end
            let exited = self.exited()?.is_some();
            self.write(&mut input);
            self.read();
            if exited {
                return Ok(End::Exited);
            }
            if self.read > MOST_STDERR_BYTES {
                return Ok(End::TooMuch);
            }
            if Instant::now() >= deadline {
                return Ok(End::Timeout);
            }
            self.pause();
        }
    }

    /// Waits until something can be read, or for a tick.
    fn pause(&self) {
        let Some(stderr) = &self.stderr else { return std::thread::sleep(TICK) };
        let tick = Timespec { tv_sec: 0, tv_nsec: TICK.subsec_nanos().into() };
        // an interrupted wait is a short one
        let _ = poll(&mut [PollFd::new(&stderr.as_fd(), PollFlags::IN)], Some(&tick));
    }

    fn write(&mut self, input: &mut &[u8]) {
        let Some(stdin) = &mut self.stdin else { return };
        match stdin.write(input) {
            Ok(n) => *input = &input[n..],
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            // a program need not read its input
            Err(_) => *input = &[],
        }
    }

    /// Reads what is there; at most so much at once that the deadline is looked at in time.
    fn read(&mut self) {
        let Some(stderr) = &mut self.stderr else { return };
        let mut buffer = [0; 16 << 10];
        for _ in 0..64 {
            match stderr.read(&mut buffer) {
                Ok(0) => {
                    self.stderr = None;
                    return;
                }
                Ok(n) => {
                    self.read += n;
                    let room = SHOWN_BYTES.saturating_sub(self.shown.len());
                    self.shown.extend_from_slice(&buffer[..n.min(room)]);
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => return,
            }
        }
    }

    /// Whether the program has ended. It stays to be waited for, so that its group's number is not given away yet.
    fn exited(&self) -> std::io::Result<Option<WaitIdStatus>> {
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
        Ok(waitid(WaitId::Pid(Pid::from_child(&self.child)), options)?)
    }

    /// Kills what is left of the group, then lets the program go.
    fn end(&mut self) -> std::io::Result<std::process::ExitStatus> {
        // an empty group is what is wanted
        let _ = kill_process_group(Pid::from_child(&self.child), Signal::KILL);
        self.child.wait()
    }

    /// What it said on standard error, for a message.
    fn said(&self) -> String {
        let text = String::from_utf8_lossy(&self.shown);
        let text: String = text.trim().chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
        if text.is_empty() { text } else { format!(": {text}") }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // after `end` the process is gone and there is nothing to kill
        if matches!(self.child.try_wait(), Ok(None)) {
            let _ = self.end();
        }
    }
}

/// The file of a program: below `folder` or absolute when there is a slash in it, else on the PATH.
fn find(program: &str, folder: &Path) -> Result<PathBuf, OptionError> {
    let runs = |path: &Path| {
        fs::metadata(path).is_ok_and(|data| data.is_file() && data.permissions().mode() & 0o111 != 0)
    };
    let fail = |why: &str| OptionError::new(format!("`command`: {program:?} {why}"));
    if program.is_empty() || program.contains('\0') {
        return Err(fail("is no name of a program"));
    }
    if program.contains('/') {
        let path = folder.join(program);
        return match (path.is_file(), runs(&path)) {
            (_, true) => Ok(path),
            (true, false) => Err(fail("is not executable")),
            (false, false) => Err(fail(&format!("is not there (looked in {})", folder.display()))),
        };
    }
    let paths = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&paths).map(|folder| folder.join(program)).find(|path| runs(path));
    found.ok_or_else(|| fail("is not a program on the PATH"))
}
