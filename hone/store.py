"""Jobs and their events, in the database of the home or of `HONE_STORE`.

Ray forgets its jobs when its head goes; this does not. Every change of a job's state is one transaction with its event.
"""

from datetime import UTC, datetime

from sqlalchemy import ForeignKey, select
from sqlalchemy.orm import Mapped, Session, mapped_column

from hone.database import Database, Table
from hone.errors import HoneError

ENDED = frozenset({"succeeded", "failed", "stopped"})


class Job(Table):
    """One training or search, wherever it runs."""

    __tablename__ = "jobs"

    id: Mapped[str] = mapped_column(primary_key=True)
    kind: Mapped[str]
    """`train` or `tune`."""
    recipe: Mapped[str]
    """Path of the recipe as the user gave it."""
    status: Mapped[str]
    """`submitted`, `running`, `succeeded`, `failed` or `stopped`."""
    address: Mapped[str | None]
    """Ray dashboard that it was submitted to; None for a local run."""
    result: Mapped[str | None]
    """What was published, or why it failed."""
    created_at: Mapped[datetime]
    updated_at: Mapped[datetime]


class JobEvent(Table):
    """One change of a job's state."""

    __tablename__ = "job_events"

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), index=True)
    at: Mapped[datetime]
    status: Mapped[str]
    message: Mapped[str]


class Store(Database):
    """Jobs, and what became of them."""

    def add_job(self, job_id: str, *, kind: str, recipe: str, status: str, address: str | None = None) -> None:
        """Record a new job and its first event."""
        now = datetime.now(UTC)
        with self._transaction() as session:
            session.add(
                Job(id=job_id, kind=kind, recipe=recipe, status=status, address=address, result=None, created_at=now, updated_at=now)
            )
            session.flush()
            session.add(JobEvent(job_id=job_id, at=now, status=status, message="created"))

    def move_job(self, job_id: str, status: str, *, message: str = "") -> bool:
        """Change a job's state; a job that has ended stays as it ended. Says whether anything changed.

        Raises:
            HoneError: no such job.
        """
        now = datetime.now(UTC)
        with self._transaction() as session:
            job = session.get(Job, job_id, with_for_update=True)
            if job is None:
                raise HoneError(f"no job {job_id!r}; `hone jobs list` shows those that are known")
            if job.status in ENDED or job.status == status:
                return False
            job.status, job.updated_at = status, now
            job.result = message or job.result
            session.add(JobEvent(job_id=job_id, at=now, status=status, message=message))
            return True

    def reopen_job(self, job_id: str) -> None:
        """Let a job that has ended badly, or that nobody saw the end of, run again.

        Raises:
            HoneError: no such job, or one that did well.
        """
        now = datetime.now(UTC)
        with self._transaction() as session:
            job = session.get(Job, job_id, with_for_update=True)
            if job is None or job.status == "succeeded":
                raise HoneError(f"{job_id!r} cannot go on: " + ("it is done" if job else "`hone runs list` shows those that are known"))
            job.status, job.updated_at, job.result = "running", now, None
            session.add(JobEvent(job_id=job_id, at=now, status="running", message="resumed"))

    def job(self, job_id: str) -> Job | None:
        with Session(self._engine, expire_on_commit=False) as session:
            return session.get(Job, job_id)

    def jobs(self) -> list[Job]:
        """Newest first."""
        with Session(self._engine, expire_on_commit=False) as session:
            return list(session.scalars(select(Job).order_by(Job.created_at.desc())))

    def events(self, job_id: str) -> list[JobEvent]:
        """Oldest first."""
        with Session(self._engine, expire_on_commit=False) as session:
            return list(session.scalars(select(JobEvent).where(JobEvent.job_id == job_id).order_by(JobEvent.id)))
