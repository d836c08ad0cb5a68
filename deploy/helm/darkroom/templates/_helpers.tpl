{{- define "darkroom.name" -}}
{{- if contains .Chart.Name .Release.Name -}}
{{- .Release.Name | trunc 52 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 52 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "darkroom.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "darkroom.labels" -}}
{{ include "darkroom.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{- define "darkroom.queue" -}}
{{ .Values.settings.RABBITMQ_QUEUE | default "image_generation" }}
{{- end -}}

{{/* The queues of jobs, as a JSON list: `scaling.queues`, or what the settings name. */}}
{{- define "darkroom.queues" -}}
{{- $queues := .Values.scaling.queues -}}
{{- if not $queues -}}
{{- range splitList "," (.Values.settings.RABBITMQ_QUEUES | default (include "darkroom.queue" .)) -}}
{{- $queues = append $queues (splitList ":" . | first | trim) -}}
{{- end -}}
{{- end -}}
{{- compact $queues | toJson -}}
{{- end -}}

{{/* KEDA's triggers: the queues that need a worker. Over HTTP messages at work count too. */}}
{{- define "darkroom.triggers" -}}
{{- $name := include "darkroom.name" . -}}
{{- $own := include "darkroom.queue" . -}}
{{- $messages := dict (printf "%s.recover" $own) .Values.scaling.messagesPerWorker (printf "%s.outbox" $own) 100000 -}}
{{- range include "darkroom.queues" . | fromJsonArray -}}
{{- $_ := set $messages . $.Values.scaling.messagesPerWorker -}}
{{- end -}}
{{- range $queue, $value := $messages }}
- type: rabbitmq
  metadata:
    protocol: http
    mode: QueueLength
    queueName: {{ $queue }}
    value: {{ $value | toString | quote }}
  authenticationRef:
    name: {{ $name }}
{{- end }}
{{- end -}}

{{/* The pod of a Deployment, or, where it ends by itself, of a Job. */}}
{{- define "darkroom.pod" -}}
{{- $name := include "darkroom.name" . -}}
{{- $endsByItself := eq .Values.scaling.mode "scaledJob" -}}
metadata:
  labels:
    {{- include "darkroom.selector" . | nindent 4 }}
  annotations:
    # New settings are new pods.
    checksum/settings: {{ .Values.settings | toJson | sha256sum }}
spec:
  {{- if $endsByItself }}
  restartPolicy: Never
  {{- end }}
  serviceAccountName: {{ $name }}
  automountServiceAccountToken: false
  # A Service called rabbitmq would otherwise set RABBITMQ_PORT to tcp://…, which is no port.
  enableServiceLinks: false
  terminationGracePeriodSeconds: {{ .Values.terminationGracePeriodSeconds }}
  {{- with .Values.imagePullSecrets }}
  imagePullSecrets:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  securityContext:
    runAsNonRoot: true
    runAsUser: 10001
    runAsGroup: 10001
    fsGroup: 10001
    fsGroupChangePolicy: OnRootMismatch
    seccompProfile:
      type: RuntimeDefault
  {{- with .Values.tolerations }}
  tolerations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .Values.nodeSelector }}
  nodeSelector:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .Values.affinity }}
  affinity:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  containers:
    - name: worker
      image: {{ printf "%s:%s" .Values.image.repository .Values.image.tag | quote }}
      imagePullPolicy: {{ .Values.image.pullPolicy }}
      {{- if $endsByItself }}
      args: [run, --exit-when-idle, {{ .Values.scaling.idleSeconds | toString | quote }}]
      {{- end }}
      envFrom:
        - configMapRef:
            name: {{ $name }}
        - secretRef:
            name: {{ .Values.existingSecret | default $name }}
      ports:
        - name: metrics
          containerPort: 9464
      startupProbe:
        httpGet:
          path: /health/ready
          port: metrics
        periodSeconds: 10
        timeoutSeconds: 5
        failureThreshold: 180
      livenessProbe:
        httpGet:
          path: /health/live
          port: metrics
        periodSeconds: 15
        timeoutSeconds: 5
        failureThreshold: 4
      readinessProbe:
        httpGet:
          path: /health/ready
          port: metrics
        periodSeconds: 5
        timeoutSeconds: 5
        failureThreshold: 2
      resources:
        {{- toYaml .Values.resources | nindent 8 }}
      securityContext:
        allowPrivilegeEscalation: false
        readOnlyRootFilesystem: true
        capabilities:
          drop: [ALL]
      volumeMounts:
        - name: models
          mountPath: /models
        - name: cache
          mountPath: /cache
        - name: tmp
          mountPath: /tmp
        {{- with .Values.extraVolumeMounts }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
  volumes:
    - name: models
      persistentVolumeClaim:
        claimName: {{ .Values.models.existingClaim | default (printf "%s-models" $name) }}
    # Each pod's own: two workers must not share a cache. A new pod compiles the GPU's kernels anew.
    - name: cache
      emptyDir:
        sizeLimit: {{ .Values.cache.sizeLimit }}
    - name: tmp
      emptyDir:
        sizeLimit: 1Gi
    {{- with .Values.extraVolumes }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
{{- end -}}
